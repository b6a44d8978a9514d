"""Targets that raise ranks, or set them up or down."""

from __future__ import annotations

from collections.abc import Mapping

from dynrank.errors import Count, validated
from dynrank.targets.base import LayerState, Target


@validated("schedule.target")
class GrowTo(Target):
    """At least this rank for all layers; a layer that is already above stays."""

    rank: Count

    def ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        return {name: layer.grown(self.rank) for name, layer in layers.items()}

    def starts(self) -> tuple[int, int]:
        return 1, self.rank


@validated("schedule.target")
class GrowBy(Target):
    """``count`` more directions for every layer."""

    count: Count

    def ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        return {name: layer.grown(layer.rank + self.count) for name, layer in layers.items()}


@validated("schedule.target")
class Exactly(Target):
    """One rank for all layers, up or down."""

    rank: Count

    def ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        return {name: max(layer.lowest, min(layer.highest, self.rank)) for name, layer in layers.items()}
