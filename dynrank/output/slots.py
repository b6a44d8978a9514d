"""The slot that a server reserves for an adapter: the highest rank, in every layer."""

from collections.abc import Mapping

# The values that vLLM accepts for --max-lora-rank.
SLOTS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# How many layers a line names.
SHOWN = 5


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
