"""A table of a change of rank, with a line for each kind of layer."""

from collections.abc import Sequence

from rich.table import Table

from dynrank.change.greedy import LossChange
from dynrank.change.resize import LayerReport
from dynrank.output.console import empty_table, span
from dynrank.output.layer_kinds import layer_kinds
from dynrank.output.slots import slot_line


def change_table(title: str, layers: Sequence[LayerReport], loss: LossChange | None = None) -> Table:
    """A line for each kind of layer, and for all: count, rank before and after, energy kept, parameters saved.

    If ranks differ, the caption names the highest rank and its layers. ``loss`` is the estimated change of the loss.
    """
    table = empty_table(title, "layers", "count", "rank", "energy kept (min)", "params saved")
    kinds = layer_kinds(layer.layer for layer in layers)
    for kind in dict.fromkeys(kinds.values()):
        table.add_row(kind, *_summary([layer for layer in layers if kinds[layer.layer] == kind]))
    table.add_section()
    table.add_row("all", *_summary(layers))
    ranks = {layer.layer: layer.rank_after for layer in layers}
    captions = [slot_line(ranks)] if len({*ranks.values()}) > 1 else []
    if loss is not None:
        captions.append(
            f"chosen by gates; their estimate of the change in loss, {loss.total:+.4f}, orders directions and is no "
            f"forecast: first order {loss.first_order:+.4f}, second {loss.second_order:+.4f}, between layers "
            f"{loss.between_layers:+.4f}"
        )
    table.caption = "\n".join(captions) or None
    return table


def _summary(layers: Sequence[LayerReport]) -> tuple[str, str, str, str]:
    before, after = ({getattr(layer, name) for layer in layers} for name in ("rank_before", "rank_after"))
    energy = [layer.energy_kept for layer in layers]
    return (
        str(len(layers)),
        f"{span(before)} → {span(after)}",
        f"{sum(energy) / len(energy):.3f} ({min(energy):.3f})",
        f"{sum(layer.parameters_saved for layer in layers):,}",
    )
