"""What a target knows of a layer, and what all targets share.

A shrink never raises a rank and a growth never lowers one; both stay within the bounds that a layer carries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from torch import Tensor

from dynrank.errors import Count, validated

UNBOUNDED = 2**31


@dataclass(frozen=True)
class LayerState:
    """What a target may know of a layer.

    Attributes:
        rank: its rank now.
        d_out, d_in: its shape.
        lowest, highest: bounds of its next rank (both the rank itself if it is pinned, both its own final rank in the
            last stage).
        final_rank: where the rank map wants it to end; None: no wish.
        values: singular values of its update in the metric of the change (scaling included), descending, ``rank``
            numbers; None where the target does not ask for them.
        cap: what the rank map has in place of a budget's ``highest``; None: nothing.
        experts: how many products of this shape and rank the layer stacks.
    """

    rank: int
    d_out: int = UNBOUNDED
    d_in: int = UNBOUNDED
    lowest: int = 1
    highest: int = UNBOUNDED
    final_rank: int | None = None
    values: Tensor | None = None
    cap: int | None = None
    experts: int = 1

    @property
    def cost(self) -> int:
        """Parameters of one direction."""
        return self.experts * (self.d_out + self.d_in)

    def shrunk(self, rank: int) -> int:
        """``rank`` brought within the bounds, never above the rank now."""
        return min(self.rank, max(self.lowest, min(self.highest, rank)))

    def grown(self, rank: int) -> int:
        """``rank`` brought within the bounds, never below the rank now."""
        return max(self.rank, min(self.highest, rank))


class Target(ABC):
    """To what rank each layer should change; write :meth:`ranks`, and ``needs`` where it reads measurements.

    Attributes:
        needs: ("values",) if it reads a layer's singular values.
        multiple: ranks are multiples of this, where bounds allow.

    >>> class Half(Target):
    ...     def ranks(self, layers):
    ...         return {name: layer.shrunk(layer.rank // 2) for name, layer in layers.items()}
    >>> Half().ranks({"q_proj": LayerState(rank=16)}), Half().reach(LayerState(rank=16))
    ({'q_proj': 8}, (8, 8))
    """

    multiple: int = 1

    @property
    def needs(self) -> tuple[str, ...]:
        return ()

    @abstractmethod
    def ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        """The next rank of every layer."""

    def reach(self, layer: LayerState) -> tuple[int, int]:
        """Lowest and highest rank that a layer may come out at, before anything is measured.

        Both bounds are monotone in the layer's rank. Override this if ``needs`` is set and the target cannot reach
        every rank within the layer's bounds.
        """
        if self.needs:
            return min(layer.rank, layer.lowest), max(layer.rank, layer.highest)
        (rank,) = self.ranks({"layer": layer}).values()
        return rank, rank

    def starts(self) -> tuple[int, int]:
        """Lowest and highest that the highest rank before the change may be; from others it would change nothing."""
        return 1, UNBOUNDED


@validated("schedule.target", kw_only=True)
class Stepped(Target):
    """A target whose ranks are multiples of ``multiple``, rounded up, and not below ``lowest``."""

    lowest: Count = 1
    multiple: Count = 1

    def least(self) -> int:
        """The lowest rank of a layer that has more."""
        return up_to_multiple(self.lowest, self.multiple)

    def starts(self) -> tuple[int, int]:
        return self.least(), UNBOUNDED


def up_to_multiple(rank: float, multiple: int) -> int:
    """``rank`` rounded up to a multiple."""
    # Rounding must not matter: 0.3 * 10 is above 3 in floats.
    return ceil(rank / multiple - 1e-9) * multiple
