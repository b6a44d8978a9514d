"""Tile sizes of the Triton kernels by GPU architecture, width of the dtype, kernel and rank bucket.

Shipped with the code, and not searched for at run time, so that two runs add in the same order. Where d_in
and d_out are multiples of 16, every row compiles without a register spill and within the architecture's shared memory;
which of several such rows is fastest has to be measured on the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BUCKETS", "MULTIPROCESSORS", "Tile", "architecture_row", "rank_bucket", "tile"]

BUCKETS = (16, 32, 64, 128)  # 16 is the least that a matrix instruction takes

# What sums over tokens are split into, at least: one program for each multiprocessor (compute unit) of the full card.
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}


@dataclass(frozen=True)
class Tile:
    """``rows`` tokens by ``slices`` sub-tiles of ``sub`` columns, worked on by ``warps`` with ``stages`` in flight."""

    rows: int
    sub: int
    slices: int
    warps: int
    stages: int

    @property
    def width(self) -> int:
        """Columns of the tile."""
        return self.sub * self.slices


# {row: {kernel: a tile for each bucket}}; under dropout a sub-tile has the 32 columns of the mask's. float32, which no
# matrix instruction multiplies exactly, has one row, for the architecture with the least shared memory.
_TABLE = {
    "sm_80": {
        "shrink": (Tile(64, 64, 1, 8, 3),) * 4,
        "shrink+drop": (*(Tile(64, 32, 8, 8, 2),) * 3, Tile(32, 32, 8, 8, 2)),
        "expand": (Tile(64, 128, 2, 8, 1),) * 4,
        "expand+drop": (Tile(64, 32, 8, 8, 1),) * 4,
        "grad_A": (Tile(64, 128, 1, 8, 3),) * 4,
        "grad_A+drop": (Tile(64, 32, 8, 8, 3), Tile(64, 32, 4, 4, 3), *(Tile(64, 32, 4, 8, 3),) * 2),
    },
    "sm_90": {
        "shrink": (*(Tile(64, 128, 1, 8, 4),) * 2, Tile(64, 128, 1, 8, 3), Tile(64, 128, 1, 8, 4)),
        "shrink+drop": (*(Tile(64, 32, 8, 8, 3),) * 3, Tile(64, 32, 8, 8, 2)),
        "expand": (Tile(64, 128, 2, 8, 1), Tile(64, 128, 1, 8, 1), *(Tile(64, 128, 2, 8, 1),) * 2),
        "expand+drop": (Tile(64, 32, 8, 8, 1),) * 4,
        "grad_A": (*(Tile(64, 256, 1, 8, 3),) * 3, Tile(64, 128, 1, 8, 3)),
        "grad_A+drop": (Tile(64, 32, 8, 8, 3), Tile(64, 32, 4, 4, 3), Tile(64, 32, 8, 8, 3), Tile(64, 32, 4, 8, 3)),
    },
    "float32": {
        "shrink": (*(Tile(64, 64, 1, 8, 3),) * 2, Tile(32, 64, 1, 8, 3), Tile(64, 32, 1, 8, 3)),
        "shrink+drop": (*(Tile(32, 32, 8, 8, 2),) * 2, *(Tile(32, 32, 8, 8, 1),) * 2),
        "expand": (Tile(64, 32, 4, 8, 1),) * 4,
        "expand+drop": (Tile(64, 32, 8, 8, 1),) * 4,
        "grad_A": (*(Tile(32, 64, 1, 8, 3),) * 3, Tile(32, 32, 1, 8, 3)),
        "grad_A+drop": (Tile(32, 32, 4, 8, 2), *(Tile(16, 32, 4, 8, 2),) * 3),
    },
}
_TABLE["sm_100"] = _TABLE["sm_90"]


def rank_bucket(rank: int) -> int:
    """The least bucket that holds ``rank``.

    Raises:
        ValueError: if no bucket does.
    """
    for bucket in BUCKETS:
        if rank <= bucket:
            return bucket
    raise ValueError(f"rank must be at most {BUCKETS[-1]}, got {rank}")


def architecture_row(backend: str, architecture: int | str) -> str | None:
    """Name of the row that serves a GPU as Triton names it (``cuda``, 90); None if there is none.

    8.6, 8.9 and 12.x have less shared memory than the others; the row of 8.0 fits into theirs, too.
    """
    major = int(architecture) // 10 if backend == "cuda" else None
    return {8: "sm_80", 9: "sm_90", 10: "sm_100", 12: "sm_80"}.get(major) if major else None


def tile(architecture: str, itemsize: int, kernel: str, rank: int) -> Tile:
    """The tile of ``kernel`` (``+drop`` with dropout) for numbers of ``itemsize`` bytes."""
    row = _TABLE["float32" if itemsize == 4 else architecture]
    return row[kernel][BUCKETS.index(rank_bucket(rank))]
