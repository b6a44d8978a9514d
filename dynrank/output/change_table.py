"""Changes of rank as a table: layers grouped by their place in a block."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rich.table import Table

from dynrank.change.resize import LayerReport
from dynrank.output.console import span

__all__ = ["change_table", "group_layers"]


def change_table(title: str, layers: Sequence[LayerReport]) -> Table:
    """A line for each group of layers, and for all: how many, rank before and after, energy kept, parameters saved."""
    table = Table(title=title)
    for heading in ("layers", "count", "rank", "energy kept (min)", "params saved"):
        table.add_column(heading, justify="left" if heading == "layers" else "right", overflow="fold")
    for group, members in group_layers(layers).items():
        table.add_row(group, *_summary(members))
    table.add_section()
    table.add_row("all", *_summary(layers))
    return table


def group_layers(layers: Iterable[LayerReport]) -> dict[str, list[LayerReport]]:
    """Reports by layer name without its numbers: ``h.0.attn`` and ``h.1.attn`` are one group, ``attn``.

    A group is named by what follows the last number, or in full (``h.*.attn``) where that would name two.
    """
    groups: dict[str, list[LayerReport]] = {}
    for layer in layers:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", layer.layer), []).append(layer)
    short = [name.rpartition("*.")[2] for name in groups]
    return {
        tail if short.count(tail) == 1 else name: members
        for tail, (name, members) in zip(short, groups.items(), strict=True)
    }


def _summary(layers: Sequence[LayerReport]) -> tuple[str, str, str, str]:
    before, after = ({getattr(layer, name) for layer in layers} for name in ("rank_before", "rank_after"))
    energy = [layer.energy_kept for layer in layers]
    return (
        str(len(layers)),
        f"{span(before)} → {span(after)}" if layers else "",
        f"{sum(energy) / len(energy):.3f} ({min(energy):.3f})" if energy else "",
        f"{sum(layer.parameters_saved for layer in layers):,}",
    )
