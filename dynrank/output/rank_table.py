"""The ranks of a model's LoRA layers as a table, which prints; pandas makes a DataFrame of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from dynrank.errors import ConfigurationError
from dynrank.layers.base import params_per_rank
from dynrank.layers.finding import lora_layers
from dynrank.output.console import empty_table, span, table_console
from dynrank.output.ranks import layer_kinds, slot_line

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class LayerRank:
    """One LoRA layer of a model.

    Attributes:
        layer: its name in the model.
        kind: the part of the name that it shares with the layers of other blocks.
        d_out, d_in: sizes of its update.
        experts: how many such updates it stacks; 1 in a plain layer.
        rank: its rank now.
        alpha: alpha = scaling * rank.
        scaling: the factor of lora_B @ lora_A in the update.
        parameters: numbers in its factors.
        final_rank: its rank at the end of a schedule by the rank map; None if that has none.
        pinned: whether schedules leave its rank unchanged.
    """

    layer: str
    kind: str
    d_out: int
    d_in: int
    experts: int
    rank: int
    alpha: float
    scaling: float
    parameters: int
    final_rank: int | None
    pinned: bool


class RankTable(tuple[LayerRank, ...]):
    """The LoRA layers of a model in its order, as a tuple; printed, it has a line for each kind of layer."""

    @property
    def parameters(self) -> int:
        """Parameters of all LoRA factors, which are what an adapter trains."""
        return sum(layer.parameters for layer in self)

    def table(self) -> Table:
        """A table of rich, with a line for each kind of layer and one for all; for ``rich.print``."""
        table = empty_table("LoRA layers", "layers", "count", "rank", "mean rank", "alpha", "parameters")
        for kind in Counter(layer.kind for layer in self):
            table.add_row(kind, *_cells([layer for layer in self if layer.kind == kind]))
        table.add_section()
        table.add_row("all", *_cells(self))
        ranks = {layer.layer: layer.rank for layer in self}
        table.caption = slot_line(ranks) if len({*ranks.values()}) > 1 else None
        return table

    def __repr__(self) -> str:
        console = table_console()
        with console.capture() as printed:
            console.print(self.table())
        return printed.get().rstrip()

    __str__ = __repr__


def _cells(layers: RankTable | list[LayerRank]) -> tuple[str, ...]:
    ranks = [layer.rank for layer in layers]
    alphas = sorted({layer.alpha for layer in layers})
    return (
        str(len(layers)),
        span(ranks),
        f"{sum(ranks) / len(ranks):.1f}",
        "-".join(f"{alpha:g}" for alpha in dict.fromkeys((alphas[0], alphas[-1]))),
        f"{sum(layer.parameters for layer in layers):,}",
    )


def ranks(model: nn.Module) -> RankTable:
    """The LoRA layers of ``model`` with their ranks: a table that prints, and ``pandas.DataFrame(table)`` takes.

    Args:
        model: a model with LoRA layers, dynrank's or PEFT's; it may be in training.

    Raises:
        ConfigurationError: if the model has no LoRA layers.

    >>> import dynrank
    >>> model = dynrank.add_lora(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), rank=4, rank_map={"1": 2})
    >>> table = dynrank.ranks(model)
    >>> [(layer.layer, layer.rank) for layer in table], table.parameters
    ([('0', 4), ('1', 2)], 88)
    >>> import pandas
    >>> print(pandas.DataFrame(table)[["layer", "rank", "parameters"]])
      layer  rank  parameters
    0     0     4          64
    1     1     2          24
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise ConfigurationError("the model has no LoRA layers; call dynrank.add_lora first")
    kinds = layer_kinds(layers)
    return RankTable(
        LayerRank(
            layer=name,
            kind=kinds[name],
            d_out=len(layer.lora_B),
            d_in=layer.lora_A[0].numel(),
            experts=layer.num_products,
            rank=layer.rank,
            alpha=layer.scaling * layer.rank,
            scaling=layer.scaling,
            parameters=layer.rank * params_per_rank(layer),
            final_rank=layer.final_rank,
            pinned=layer.pinned,
        )
        for name, layer in layers.items()
    )
