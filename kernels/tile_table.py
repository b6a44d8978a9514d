"""Tile sizes of the Triton kernels by rank bucket, for every GPU that they serve.

Shipped with the code, and not searched for at run time, so that two runs add in the same order. Compiled for compute
capability 8.0, 8.9, 9.0, 10.0 and 12.0, no tile spills a register, and a multiprocessor holds PER_MULTIPROCESSOR
programs at once, those of 8.9 and 12.0 with their 100 KiB of shared memory included. Four warps on 64 rows: eight would
compute the mask of the product's first operand twice. Which of several such tiles is fastest has to be measured.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["BUCKETS", "PER_MULTIPROCESSOR", "ROWS", "WARPS", "Tile", "rank_bucket", "tile"]

BUCKETS = (16, 32, 64, 128)  # 16 is the least that a matrix instruction takes
PER_MULTIPROCESSOR = 2
ROWS, WARPS = 64, 4


class Tile(NamedTuple):
    """ROWS tokens by ``width`` columns, with ``stages`` of a loop's loads in flight."""

    width: int
    stages: int


_TABLE = {  # a tile for each bucket
    "shrink": (Tile(128, 2), Tile(128, 2), Tile(64, 3), Tile(32, 3)),
    "expand": (Tile(128, 1),) * 4,
    "grad_A": (Tile(128, 2), Tile(128, 2), Tile(128, 2), Tile(64, 2)),
}


def rank_bucket(rank: int) -> int:
    """The least bucket that holds ``rank``.

    Raises:
        ValueError: if no bucket does.
    """
    for bucket in BUCKETS:
        if rank <= bucket:
            return bucket
    raise ValueError(f"rank must be at most {BUCKETS[-1]}, got {rank}")


def tile(kernel: str, rank: int) -> Tile:
    """The tile of ``kernel`` at ``rank``, with dropout and without."""
    return _TABLE[kernel][BUCKETS.index(rank_bucket(rank))]
