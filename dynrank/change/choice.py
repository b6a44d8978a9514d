"""Which directions of each layer a change of ranks keeps, and what each direction is worth to targets."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dynrank.change.greedy import LossChange
from dynrank.errors import diverged
from dynrank.layers.base import RankedLayer
from dynrank.linalg import Directions, directions_of, pooled


class Choice:
    """The choice by weight, which keeps the largest directions; :class:`dynrank.change.gates.Gates` is another.

    Args:
        layers: name -> layer.
    """

    def __init__(self, layers: Mapping[str, RankedLayer]) -> None:
        self._layers = dict(layers)
        # By layer: the versions of its factors, and their directions.
        self._known: dict[str, tuple[tuple[int, int], list[Directions]]] = {}

    @torch.no_grad()
    def directions(self, name: str) -> list[Directions]:
        """The present directions of each product of a layer; not computed again until its factors change."""
        layer = self._layers[name]
        versions = layer.lora_A._version, layer.lora_B._version
        if name not in self._known or self._known[name][0] != versions:
            try:
                self._known[name] = versions, [directions_of(b, a) for b, a in layer.products()]
            except ValueError as error:
                raise diverged(name, error) from error
        return self._known[name][1]

    def values(self) -> dict[str, Tensor]:
        """{layer: (rank,) float64, descending}: what its directions are worth; by weight, the update's singular values.

        The scaling is included.
        """
        return {
            name: pooled([each.singular_values for each in self.directions(name)]) * layer.scaling
            for name, layer in self._layers.items()
        }

    def kept(self, ranks: Mapping[str, int]) -> dict[str, Tensor]:
        """{layer: the directions to keep, ascending} for the layers in ``ranks``."""
        return {name: torch.arange(rank) for name, rank in ranks.items()}

    def change(self, kept: Mapping[str, Tensor]) -> dict[str, LossChange]:
        """{layer: its part of the estimated change of the loss} if each layer keeps these directions; {} if unknown."""
        return {}
