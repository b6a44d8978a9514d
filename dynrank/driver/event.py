"""One change of ranks in a run, for callbacks, checkpoints and rank_history.csv."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table

from dynrank.change.reports import LayerReport
from dynrank.output.ranks import change_table, ranks_in_words

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
        reason: why the change was made or tried.
        layers: a report for each layer with new factors; layers that only were balanced have one, too.
        undone: whether the change cost too much and was undone; then the ranks are as before.
        measured: what the change cost, also if it was undone; None: it was not measured.
        lr_factor: factor of the adapters' learning rates by the change, from here on.

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
        """``undone: fraction 0.33; val/loss 1.489 → 1.512 by the cut``: the reason in rank_history.csv."""
        kind = "cut" if any(layer.rank_after < layer.rank_before for layer in self.layers) else "change"
        cost = "" if self.measured is None else f"; {self.measured} by the {kind}"
        return f"{'undone: ' if self.undone else ''}{self.reason}{cost}"

    def __str__(self) -> str:
        """One line: the step, the reason, what follows for the adapters' rate, and the ranks."""
        ranks = f"{ranks_in_words(self.ranks_before)} → {ranks_in_words(la.rank_after for la in self.layers)}"
        return f"{self.title} ({ranks} in {len(self.layers)} layers)"

    __repr__ = __str__

    @property
    def title(self) -> str:
        """The step, the reason, the cost and the factor of the rate, as the heading of the table."""
        rate = f"; adapter's rate × {self.lr_factor:.3g} from here" if self.lr_factor != 1.0 else ""
        return f"rank change at step {self.step}: {self.reason_and_cost}{rate}"

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
