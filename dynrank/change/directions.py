"""The directions of layers, decomposed once each."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from dynrank.errors import diverged
from dynrank.layers.ranked_layer import RankedLayer
from dynrank.linalg import Directions, directions_of, pooled


class LayerDirections:
    """The directions of ``layers`` (name -> layer), each of which is decomposed once, when it is first asked for.

    They are those of the factors at that time. Factors may change in between if they are restored bit for bit, as
    after a trial; after any other change make a new object.
    """

    def __init__(self, layers: Mapping[str, RankedLayer]) -> None:
        self._layers = dict(layers)
        self._known: dict[str, list[Directions]] = {}

    @property
    def names(self) -> Collection[str]:
        """The layers whose directions can be asked for."""
        return self._layers.keys()

    @torch.no_grad()
    def of(self, name: str) -> list[Directions]:
        """The directions of each product of a layer."""
        if name not in self._known:
            try:
                self._known[name] = [directions_of(b, a) for b, a in self._layers[name].products()]
            except ValueError as error:
                raise diverged(name, error) from error
        return self._known[name]

    def values(self) -> dict[str, Tensor]:
        """{layer: (rank,) float64, descending}: the singular values of its update, scaling included."""
        return {
            name: pooled([each.singular_values for each in self.of(name)]) * layer.scaling
            for name, layer in self._layers.items()
        }
