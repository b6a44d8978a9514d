"""Targets that lower each layer's rank by itself: to a number, by a factor, or as its singular values say."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from math import cos, pi
from typing import Literal

from torch import Tensor

from dynrank.errors import ConfigurationError, Count, Share, validated
from dynrank.linalg import effective_rank, energy_rank, numerical_rank
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
        return (self.rank if self.step == 1 else 1), UNBOUNDED  # the steps before may have come to the end

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
class FinalRanks(Target):
    """Each layer to the final rank that the rank map gives it; the others stay."""

    def ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        return {name: layer.shrunk(layer.final_rank or layer.rank) for name, layer in layers.items()}


@validated("schedule.target")
class Factor(Stepped):
    """The rank now times ``factor``, not below ``lowest``, rounded up to ``multiple``."""

    factor: Share

    def ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        return {name: layer.shrunk(self._next(layer.rank)) for name, layer in layers.items()}

    def _next(self, rank: int) -> int:
        return up_to_multiple(max(self.lowest, rank * self.factor), self.multiple)


class BySpectrum(Stepped):
    """A rank for each layer from its own singular values, not below ``lowest``, rounded up to ``multiple``."""

    needs = ("values",)

    def ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        return {name: layer.shrunk(self._next(layer)) for name, layer in layers.items()}

    def reach(self, layer: LayerState) -> tuple[int, int]:
        return layer.shrunk(self.least()), layer.shrunk(layer.rank)

    def _next(self, layer: LayerState) -> int:
        assert layer.values is not None
        return up_to_multiple(max(self.lowest, self.wanted(layer.values)), self.multiple)

    @abstractmethod
    def wanted(self, values: Tensor) -> float:
        """The rank for these singular values, descending, before rounding up."""


@validated("schedule.target")
class Energy(BySpectrum):
    """The fewest directions that keep ``share`` of each layer's energy: the sum of SQUARED singular values."""

    share: Share

    def wanted(self, values: Tensor) -> float:
        return energy_rank(values, self.share)


@validated("schedule.target")
class EffectiveRank(BySpectrum):
    """The effective rank of each layer's update, exp of the entropy of its singular values (Roy and Vetterli, 2007)."""

    def wanted(self, values: Tensor) -> float:
        return effective_rank(values) - 1e-9  # an exact integer stays itself


@validated("schedule.target")
class NumericalRank(BySpectrum):
    """The singular values above ``tolerance`` times the largest; what is below is as good as zero."""

    tolerance: Share = 1e-3

    def wanted(self, values: Tensor) -> float:
        return numerical_rank(values, 1, self.tolerance)
