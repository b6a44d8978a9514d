"""Targets that lower the rank of each layer separately: to a number, or by its singular values."""

from __future__ import annotations

from collections.abc import Mapping
from math import cos, pi
from typing import Literal

from dynrank.errors import ConfigurationError, Count, Share, validated
from dynrank.linalg import energy_rank
from dynrank.targets.base import UNBOUNDED, LayerState, Stepped, Target, up_to_multiple


@validated("schedule.target")
class Rank(Target):
    """At most this rank for all layers; a layer below it keeps its rank."""

    rank: Count

    def ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        return {name: layer.shrunk(self.rank) for name, layer in layers.items()}

    def starts(self) -> tuple[int, int]:
        return self.rank, UNBOUNDED


@validated("schedule.target")
class Towards(Target):
    """Step ``step`` of ``steps`` from the starting rank to ``rank``.

    Args:
        rank: rank after the last step; a layer with a final rank in the rank map ends at that.
        step: 1 to ``steps``.
        steps: how many steps there are.
        shape: "geometric" (equal factors: 64, 32, 16, 8), "linear" (equal differences) or "cosine" (half a period).

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
        # Earlier steps may have reached the final rank already.
        return (self.rank if self.step == 1 else 1), UNBOUNDED

    def _next(self, rank: int, final_rank: int | None) -> int:
        """The next rank, computed from the rank after ``step - 1`` steps."""
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
    """The lowest rank that keeps ``share`` of each layer's energy, the sum of SQUARED singular values.

    A layer keeps at least rank ``lowest``, and its rank is rounded up to a multiple of ``multiple``.
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
