"""Targets that lower each layer's rank by itself: to a number, or as its singular values say."""

from __future__ import annotations

from collections.abc import Mapping
from math import cos, pi
from typing import Literal

from dynrank.errors import ConfigurationError, Count, Share, validated
from dynrank.linalg import energy_rank
from dynrank.targets.base import UNBOUNDED, LayerState, Stepped, Target, up_to_multiple


@validated("schedule.target")
class Rank(Target):
    """One rank for all layers; a layer that is already below stays."""

    rank: Count

    def ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        return {name: layer.shrunk(self.rank) for name, layer in layers.items()}

    def starts(self) -> tuple[int, int]:
        return self.rank, UNBOUNDED


@validated("schedule.target")
class Towards(Target):
    """Step ``step`` of ``steps`` on the way to ``rank``, from wherever the layer stood before the first.

    Args:
        rank: where the way ends (a layer with a final rank of its own ends there).
        step: 1 to ``steps``.
        steps: of the whole way.
        shape: "geometric" (equal factors: 64, 32, 16, 8), "linear" (equal differences) or "cosine" (half a wave).

    >>> Towards(8, step=1, steps=3).ranks({"layer": LayerState(rank=64)})
    {'layer': 32}
    """

    rank: Count
    step: Count = 1
    steps: Count = 1
    shape: Literal["geometric", "linear", "cosine"] = "geometric"

    def __post_init__(self) -> None:
        if self.step > self.steps:
            raise ConfigurationError(f"step must be at most steps = {self.steps}, got {self.step}")

    def ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        return {name: layer.shrunk(self._next(layer.rank, layer.final_rank)) for name, layer in layers.items()}

    def starts(self) -> tuple[int, int]:
        # The steps before may have reached the end already.
        return (self.rank if self.step == 1 else 1), UNBOUNDED

    def _next(self, rank: int, final_rank: int | None) -> int:
        """From the rank after ``step - 1`` steps, so that the start need not be remembered."""
        end, left = final_rank or self.rank, self.steps - self.step
        if rank <= end or left == 0:
            return end
        if self.shape == "geometric":
            return max(end, round(rank * float((end / rank) ** (1 / (left + 1)))))
        if self.shape == "linear":
            share = left / (left + 1)
        else:
            share = (1 + cos(pi * self.step / self.steps)) / (1 + cos(pi * (self.step - 1) / self.steps))
        return round(end + (rank - end) * share)


@validated("schedule.target")
class Energy(Stepped):
    """The fewest directions that keep ``share`` of each layer's energy: the sum of SQUARED singular values.

    A layer keeps at least ``lowest`` directions, and its rank is rounded up to a multiple of ``multiple``.
    """

    share: Share

    needs = ("values",)

    def ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        return {name: layer.shrunk(self._next(layer)) for name, layer in layers.items()}

    def reach(self, layer: LayerState) -> tuple[int, int]:
        return layer.shrunk(self.least()), layer.shrunk(layer.rank)

    def _next(self, layer: LayerState) -> int:
        assert layer.values is not None
        return up_to_multiple(max(self.lowest, energy_rank(layer.values, self.share)), self.multiple)
