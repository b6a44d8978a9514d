"""The target that raises ranks."""

from __future__ import annotations

from collections.abc import Mapping

from dynrank.errors import Count, validated
from dynrank.targets.base import LayerState, Target


@validated("schedule.target")
class GrowTo(Target):
    """At least this rank for all layers; a layer above it keeps its rank."""

    rank: Count

    def ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        return {name: layer.grown(self.rank) for name, layer in layers.items()}

    def starts(self) -> tuple[int, int]:
        return 1, self.rank
