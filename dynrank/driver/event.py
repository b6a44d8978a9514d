"""One change of ranks in a run, for callbacks, checkpoints and rank_history.csv; and all of a run as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table

from dynrank.change.reports import LayerReport
from dynrank.output.console import empty_table, span, table_text
from dynrank.output.ranks import change_table, ranks_in_words

# What the reason of an undone change begins with.
UNDONE = "undone: "

# Columns of rank_history.csv.
FIELDS = (
    *("step", "layer", "rank_before", "rank_after", "importance", "importance_error"),
    *("energy_kept", "predicted_error", "reason"),
)


@dataclass(frozen=True)
class Measured:
    """A metric directly before and directly after a change."""

    metric: str
    before: float
    after: float

    def __str__(self) -> str:
        return f"{self.metric} {self.before:.4g} → {self.after:.4g}"


@dataclass(frozen=True, repr=False)
class RankEvent:
    """One change of ranks, or one that was tried and undone.

    Attributes:
        step: optimizer steps made before the change.
        reason: why the change was made, or why it was undone.
        layers: a report for each layer with new factors; layers that only were balanced have one, too.
        undone: whether the change cost too much and was undone; then the ranks are as before.
        measured: what the change cost, also if it was undone; None: it was not measured.
        lr_factor: factor of the adapters' learning rates by the change, from here on.

    In an interactive session an event is shown as its table, and ``print`` writes one line.

    >>> import torch, dynrank
    >>> model = dynrank.add_lora(torch.nn.Sequential(torch.nn.Linear(8, 8)), rank=4)
    >>> event = RankEvent(100, "half of the run", tuple(dynrank.resize(model, 2, optimizers=())))
    >>> print(event)
    rank change at step 100: half of the run (rank 4 → rank 2 in 1 layers)
    >>> event.lowers, event.layers[0].parameters_saved
    (True, 32)
    """

    step: int
    reason: str
    layers: tuple[LayerReport, ...]
    undone: bool = False
    measured: Measured | None = None
    lr_factor: float = 1.0

    @property
    def reason_and_cost(self) -> str:
        """The reason, and what the change cost, unless the reason says it."""
        if self.cost is None or str(self.measured) in self.reason:
            return self.reason
        return f"{self.reason}; {self.cost}"

    @property
    def cost(self) -> str | None:
        """``val/loss 1.489 → 1.512 by the cut``; None if it was not measured."""
        kind = "cut" if any(layer.rank_after < layer.rank_before for layer in self.layers) else "change"
        return None if self.measured is None else f"{self.measured} by the {kind}"

    def __str__(self) -> str:
        """One line: the step, the reason, what follows for the adapters' rate, and the ranks."""
        ranks = f"{ranks_in_words(self.ranks_before)} → {ranks_in_words(la.rank_after for la in self.layers)}"
        return f"{self.title} ({ranks} in {len(self.layers)} layers)"

    def __repr__(self) -> str:
        return table_text(self.table())

    @property
    def title(self) -> str:
        """The step, the reason, the cost and the factor of the rate, as the heading of the table."""
        name = f"rank change {'undone ' if self.undone else ''}at step {self.step}"
        rate = f"; adapter's rate × {self.lr_factor:.3g} from here" if self.lr_factor != 1.0 else ""
        return f"{name}: {self.reason_and_cost.removeprefix(UNDONE)}{rate}"

    def table(self, ranks: Mapping[str, int] | None = None) -> Table:
        """A table of rich, with a line for each kind of layer.

        ``ranks`` are those of all layers after the change, and give the table the layers that did not change.
        """
        changed = {la.layer: la.rank_before if self.undone else la.rank_after for la in self.layers}
        return change_table(self.title, self.layers, ranks or changed, undone=self.undone)

    @property
    def ranks_before(self) -> list[int]:
        """The ranks of the changed layers before the change."""
        return [layer.rank_before for layer in self.layers]

    @property
    def lowers(self) -> bool:
        """Whether the change was made and has lowered a rank."""
        return not self.undone and any(layer.rank_after < layer.rank_before for layer in self.layers)


class History(list[RankEvent]):
    """The changes of a run, in the order of time; shown in an interactive session, it is a table of them."""

    def table(self) -> Table:
        """A table of rich, with a line for each change; for ``rich.print``."""
        table = empty_table(
            "changes of rank",
            *("step", "reason", "layers", "rank", "adapter's rate", "params saved"),
            texts=["step", "reason"],
        )
        for event in self:
            after = {layer.rank_after for layer in event.layers}
            saved = 0 if event.undone else sum(layer.parameters_saved for layer in event.layers)
            ranks = f"{span({*event.ranks_before})} → {span(after)}"
            table.add_row(
                f"{event.step:,}",
                event.reason_and_cost,
                str(len(event.layers)),
                f"{ranks}, undone" if event.undone else ranks,
                f"× {event.lr_factor:.3g}",
                f"{saved:,}",
            )
        return table

    def __repr__(self) -> str:
        return table_text(self.table()) if self else "[]"
