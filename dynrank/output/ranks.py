"""The ranks of many layers in few words: the table of a model, and of a change; kinds of layers."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table
from torch import nn

from dynrank.errors import ConfigurationError
from dynrank.layers.finding import lora_layers
from dynrank.output.console import empty_table, span, table_text
from dynrank.output.slots import slot_line
from dynrank.rank_map import BOUNDS

if TYPE_CHECKING:
    from dynrank.change.reports import LayerReport

# A number that is a whole part of a layer's name.
_NUMBER = r"(?<=[._])\d+(?=[._])"
# The most characters of a kind's name that stay in one line of a table.
_ONE_LINE = 40
_IMPORTANCE = (
    "importance: how much the layers' updates have lowered the loss so far, plus the standard error of that, as a "
    "share of all layers'; a pool gives each layer a rank by it, within the layer's bounds"
)


def layer_kinds(names: Iterable[str]) -> dict[str, str]:
    """{layer: its kind}: the part of its name after the last number, or the whole name with * for its numbers.

    The whole name is used if the part alone would give layers at different positions the same kind.

    >>> layer_kinds(["h.0.attn.q", "h.1.attn.q", "head"])
    {'h.0.attn.q': 'attn.q', 'h.1.attn.q': 'attn.q', 'head': 'head'}
    >>> layer_kinds(["encoder.0.q", "decoder.0.q"])
    {'encoder.0.q': 'encoder.*.q', 'decoder.0.q': 'decoder.*.q'}
    >>> layer_kinds(["lora_unet_blocks_0_to_q"])
    {'lora_unet_blocks_0_to_q': 'to_q'}
    """
    whole = {name: re.sub(_NUMBER, "*", name) for name in names}
    tails = {kind: re.sub(r".*\*[._]", "", kind) for kind in whole.values()}
    counts = Counter(tails.values())
    return {name: tails[kind] if counts[tails[kind]] == 1 else kind for name, kind in whole.items()}


def block_of(name: str) -> tuple[int, ...]:
    """The numbers in a layer's name; layers of one kind differ in nothing else.

    >>> block_of("model.layers.11.mlp.experts.3.up"), block_of("lm_head")
    ((11, 3), ())
    """
    return tuple(map(int, re.findall(_NUMBER, name)))


def ranks_in_words(ranks: Iterable[int]) -> str:
    """The lowest and the highest of ``ranks``.

    >>> ranks_in_words([16, 16]), ranks_in_words([1, 3, 8])
    ('rank 16', 'ranks 1 to 8')
    """
    low, *_, high = sorted({*ranks}) * 2
    return f"rank {low}" if low == high else f"ranks {low} to {high}"


def change_table(
    title: str, changed: Sequence[LayerReport], ranks: Mapping[str, int], *, undone: bool = False
) -> Table:
    """A line for each kind of layer that changed, and for all: count, ranks, importance, energy kept, parameters saved.

    Importance has a column if it is known, as each layer's share of the sum of all, and a line below the table. If the
    ranks differ, another line says what a server's slot has.

    Args:
        title: the heading.
        changed: what changed in each layer.
        ranks: those of all layers as they are now, also of the unchanged ones.
        undone: whether the change was undone, and so has saved nothing.
    """
    kinds = layer_kinds(ranks)
    total = Counter(kinds.values())
    of_kinds = {
        kind: [layer for layer in changed if kinds[layer.layer] == kind]
        for kind in dict.fromkeys(kinds[layer.layer] for layer in changed)
    }
    columns = ["count", "rank tried" if undone else "rank", "importance", "energy kept (min)", "params saved"]
    known = sum(layer.score for layer in changed if layer.score is not None)
    shown = [name for name in columns if (name != "importance" or known) and not (undone and name == "params saved")]
    table = empty_table(title, "layers", *shown)
    for kind, layers in of_kinds.items():
        table.add_row(kind, *_summary(layers, total[kind], known, shown))
    table.add_section()
    table.add_row("all", *_summary(changed, len(ranks), known, shown))
    table.columns[0].min_width = min(_ONE_LINE, max(map(len, kinds.values())))
    lines = [_IMPORTANCE] if known else []
    lines += [slot_line(ranks)] if len({*ranks.values()}) > 1 and not undone else []
    table.caption = "\n".join(lines) or None
    return table


def _summary(changed: Sequence[LayerReport], total: int, importance: float, columns: Sequence[str]) -> list[str]:
    """The cells of ``columns`` in a line about ``changed`` of ``total`` layers; ``importance`` is the sum of all."""
    before, after = ({getattr(layer, name) for layer in changed} for name in ("rank_before", "rank_after"))
    energy = [layer.energy_kept for layer in changed]
    shares = sorted(100 * layer.score / importance for layer in changed if layer.score is not None and importance)
    ranks = f"{span(before)} → {span(after)}"
    cells = {
        "count": f"{total}" if len(changed) == total else f"{len(changed)} of {total}",
        "rank": ranks,
        "rank tried": ranks,
        "importance": "-".join(dict.fromkeys(f"{share:.1f}" for share in shares[:1] + shares[-1:]))
        + "%" * bool(shares),
        "energy kept (min)": f"{sum(energy) / len(energy):.3f} ({min(energy):.3f})",
        "params saved": f"{sum(layer.parameters_saved for layer in changed):,}",
    }
    return [cells[name] for name in columns]


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
        final_rank: its rank at the end of a schedule by the rank map of add_lora; None if that has none.
        pinned: whether that map lets schedules leave its rank unchanged.
        lowest, highest: its bounds by that map; None if it has none.
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
    lowest: int | None
    highest: int | None


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
        return table_text(self.table())

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


def scalings_notice(layers: Iterable[LayerRank]) -> str | None:
    """How many layers have which scaling, and the kinds of all but the most; None if all have the same.

    >>> import dynrank
    >>> plain = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    >>> model = dynrank.add_lora(plain, rank=4, rank_map={"2": {"rank": 2, "alpha": 8}})
    >>> scalings_notice(ranks(model))
    'layers differ in their scaling: 2 in 2 layers, 4 in 1 (2)'
    """
    kinds = defaultdict[str, list[str]](list)
    for layer in layers:
        kinds[f"{layer.scaling:.3g}"].append(layer.kind)
    most, *others = sorted(kinds, key=lambda scaling: -len(kinds[scaling]))
    named = [f"{scaling} in {len(kinds[scaling])} ({', '.join(dict.fromkeys(kinds[scaling]))})" for scaling in others]
    said = f"layers differ in their scaling: {most} in {len(kinds[most])} layers"
    return ", ".join([said, *named]) if others else None


def rank_totals(model: nn.Module) -> dict[str, float]:
    """``rank/mean``, ``rank/max`` and ``rank/parameters`` of the LoRA layers, for loggers; empty if there are none."""
    layers = [layer for _, layer in lora_layers(model)]
    if not layers:
        return {}
    return {
        "rank/mean": sum(layer.rank for layer in layers) / len(layers),
        "rank/max": float(max(layer.rank for layer in layers)),
        "rank/parameters": float(sum(layer.rank * layer.params_per_rank for layer in layers)),
    }


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
            d_out=layer.d_out,
            d_in=layer.d_in,
            experts=layer.num_products,
            rank=layer.rank,
            alpha=layer.scaling * layer.rank,
            scaling=layer.scaling,
            parameters=layer.rank * layer.params_per_rank,
            **{name: getattr(layer.bounds, name) for name in BOUNDS},
        )
        for name, layer in layers.items()
    )
