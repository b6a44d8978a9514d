"""The directions of each layer's update, computed once until its factors change."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dynrank.errors import diverged
from dynrank.layers.base import RankedLayer
from dynrank.linalg import Directions, directions_of, pooled


class LayerDirections:
    """The present directions of ``layers`` (name -> layer)."""

    def __init__(self, layers: Mapping[str, RankedLayer]) -> None:
        self._layers = dict(layers)
        # By layer: the versions of its factors, and their directions.
        self._known: dict[str, tuple[tuple[int, int], list[Directions]]] = {}

    @torch.no_grad()
    def of(self, name: str) -> list[Directions]:
        """The directions of each product of a layer."""
        layer = self._layers[name]
        versions = layer.lora_A._version, layer.lora_B._version
        if name not in self._known or self._known[name][0] != versions:
            try:
                self._known[name] = versions, [directions_of(b, a) for b, a in layer.products()]
            except ValueError as error:
                raise diverged(name, error) from error
        return self._known[name][1]

    def values(self) -> dict[str, Tensor]:
        """{layer: (rank,) float64, descending}: the singular values of its update, scaling included."""
        return {
            name: pooled([each.singular_values for each in self.of(name)]) * layer.scaling
            for name, layer in self._layers.items()
        }
