"""The slot that a server reserves for an adapter: the highest rank, in every layer."""

from collections.abc import Mapping

# The values that vLLM accepts for --max-lora-rank.
SLOTS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# The most layers that a line names.
SHOWN = 5


def slot_rank(highest: int) -> int:
    """The lowest --max-lora-rank of vLLM for adapters of this highest rank, or the rank itself if it is too high.

    >>> slot_rank(3), slot_rank(9)
    (8, 16)
    """
    return next((slot for slot in SLOTS if slot >= highest), highest)


def slot_line(ranks: Mapping[str, int]) -> str:
    """Highest and average rank, the rank of a server's slot, and what it would be without the few highest layers.

    A server's slot for an adapter has the highest rank in every layer.

    >>> slot_line({"q": 2, "k": 2, "v": 2, "pooler": 13})
    "highest rank 13, average 4.8: a server's slot has 16 in every layer; without 1 of 4 layers it has 8: pooler (13)"
    >>> slot_line({"q": 2, "v": 4})
    "highest rank 4, average 3.0: a server's slot has 8 in every layer"
    """
    highest = max(ranks.values())
    slot = slot_rank(highest)
    line = f"highest rank {highest}, average {average(ranks):.1f}: a server's slot has {slot} in every layer"
    below = max((step for step in SLOTS if 1 < step < slot), default=highest)
    above = sorted((name for name in ranks if ranks[name] > below), key=lambda name: -ranks[name])
    # Most layers are no exception.
    if not 0 < len(above) <= len(ranks) / 2:
        return line
    without = slot_rank(max(rank for rank in ranks.values() if rank <= below))
    names = ": " + ", ".join(f"{name} ({ranks[name]})" for name in above) if len(above) <= SHOWN else ""
    return f"{line}; without {len(above)} of {len(ranks)} layers it has {without}{names}"


def average(ranks: Mapping[str, int]) -> float:
    """The mean rank of the layers."""
    return sum(ranks.values()) / len(ranks)
