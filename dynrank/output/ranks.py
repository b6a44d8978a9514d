"""The ranks of many layers in few words: kinds of layers, the slot of a server, the table of a change."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from dynrank.output.console import empty_table, span

if TYPE_CHECKING:
    from rich.table import Table

    from dynrank.change.resize import LayerReport

# The values that vLLM accepts for --max-lora-rank.
SLOTS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# How many layers a line names.
SHOWN = 5
# A number that is a whole part of a layer's name.
_NUMBER = r"(?<=[._])\d+(?=[._])"
# The most characters of a kind's name that stay in one line of a table.
_ONE_LINE = 40


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


def slot_rank(highest: int) -> int:
    """The lowest --max-lora-rank of vLLM for adapters of this highest rank, or the rank itself if it is too high.

    >>> slot_rank(3), slot_rank(9)
    (8, 16)
    """
    return next((slot for slot in SLOTS if slot >= highest), highest)


def slot_line(ranks: Mapping[str, int]) -> str:
    """Highest and average rank, the rank of a server's slot, and the layers that make it so high.

    A server's slot for an adapter has the highest rank in every layer.

    >>> slot_line({"q": 2, "v": 2, "pooler": 13})
    "highest rank 13, average 5.7: a server's slot has 16 in every layer, because of 1 of 3 layers: pooler (13)"
    >>> slot_line({"q": 2, "v": 4})
    "highest rank 4, average 3.0: a server's slot has 8 in every layer"
    """
    highest = max(ranks.values())
    average = sum(ranks.values()) / len(ranks)
    slot = slot_rank(highest)
    line = f"highest rank {highest}, average {average:.1f}: a server's slot has {slot} in every layer"
    below = max((step for step in SLOTS if 1 < step < slot), default=highest)
    above = sorted((name for name in ranks if ranks[name] > below), key=lambda name: -ranks[name])
    if not 0 < len(above) < len(ranks):
        return line
    names = ", ".join(f"{name} ({ranks[name]})" for name in above[:SHOWN])
    return f"{line}, because of {len(above)} of {len(ranks)} layers: {names}{', …' if len(above) > SHOWN else ''}"


def change_table(title: str, changed: Sequence[LayerReport], ranks: Mapping[str, int]) -> Table:
    """A line for each kind of layer that changed, and for all: count, ranks, energy kept, parameters saved.

    ``ranks`` are those of all layers as they are now, also of the unchanged ones. If they differ, the caption names
    the highest and its layers.
    """
    table = empty_table(title, "layers", "count", "rank", "energy kept (min)", "params saved")
    kinds = layer_kinds(ranks)
    total = Counter(kinds.values())
    for kind in dict.fromkeys(kinds[layer.layer] for layer in changed):
        table.add_row(kind, *_summary([layer for layer in changed if kinds[layer.layer] == kind], total[kind]))
    table.add_section()
    table.add_row("all", *_summary(changed, len(ranks)))
    table.columns[0].min_width = min(_ONE_LINE, max(map(len, kinds.values())))
    table.caption = slot_line(ranks) if len({*ranks.values()}) > 1 else None
    return table


def _summary(changed: Sequence[LayerReport], total: int) -> tuple[str, str, str, str]:
    before, after = ({getattr(layer, name) for layer in changed} for name in ("rank_before", "rank_after"))
    energy = [layer.energy_kept for layer in changed]
    return (
        f"{total}" if len(changed) == total else f"{len(changed)} of {total}",
        f"{span(before)} → {span(after)}",
        f"{sum(energy) / len(energy):.3f} ({min(energy):.3f})",
        f"{sum(layer.parameters_saved for layer in changed):,}",
    )
