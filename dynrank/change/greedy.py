"""Which directions of each layer a cut keeps: the largest (:class:`ByWeight`), or those that the loss needs most.

The latter is a greedy choice by a quadratic estimate with all interactions (:class:`Quadratic`). Every direction has a
gate, a factor of 1 before it. With ``g`` the gradient of the loss by the gates and ``H`` an estimate of its Hessian,
dropping the set S changes the loss by about ``-sum_S g + 1/2 sum_{S x S} H``. The greedy repeatedly drops the direction
that adds least to this per parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dynrank.errors import diverged
from dynrank.layers.base import RankedLayer
from dynrank.linalg import Directions, directions_of, pooled


@dataclass(frozen=True)
class LossChange:
    """The estimated change of the loss by a change of ranks, or one layer's part of it.

    Attributes:
        first_order: minus the sum of the gradients by the gates of dropped directions.
        second_order: the part of the curvature within a layer.
        between_layers: the part of the curvature between layers; each of two layers gets half.
    """

    first_order: float
    second_order: float
    between_layers: float

    @property
    def total(self) -> float:
        return self.first_order + self.second_order + self.between_layers


class ByWeight:
    """Keeps the largest directions; :class:`dynrank.change.gates.Gates` keeps those that the loss needs most.

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

    def estimated_loss(self, kept: Mapping[str, Tensor]) -> dict[str, LossChange]:
        """{layer: its part of the estimated change of the loss} if each layer keeps these directions; {} if unknown."""
        return {}


class Quadratic:
    """The quadratic estimate of the loss in all gates.

    Args:
        gradients: {layer: (R,) gradient of the loss by its gates}.
        roots: {layer: (S, R)}, its columns in a root of the Hessian: ``H = roots^T roots`` with those of all layers.
        params_per_rank: {layer: parameters of one of its directions}.
        margins: {layer: (R,) amount by which the choice lowers each gradient}; None means 0.

    Everything is float64 on the CPU. Layers are sorted by name, so their given order does not change the choice. Of
    equal candidates the last one is dropped; in a layer that no gradient has reached, that is its smallest direction.
    """

    def __init__(
        self,
        gradients: Mapping[str, Tensor],
        roots: Mapping[str, Tensor],
        params_per_rank: Mapping[str, int],
        margins: Mapping[str, Tensor] | None = None,
    ) -> None:
        names, counts = sorted(gradients), [len(gradients[name]) for name in sorted(gradients)]
        ends = np.cumsum(counts)
        self._slices = {
            name: slice(int(end) - count, int(end)) for name, end, count in zip(names, ends, counts, strict=True)
        }
        self._owners = np.repeat(np.arange(len(names)), counts)
        self._gradient = torch.cat([gradients[name] for name in names]).numpy()
        self._roots = torch.cat([roots[name] for name in names], dim=1).numpy()
        self._sizes = np.repeat([float(params_per_rank[name]) for name in names], counts)
        self._margin = torch.cat([margins[name] for name in names]).numpy() if margins else 0.0
        self._hessian = self._roots.T @ self._roots

    def dropped(self, ranks: Mapping[str, int]) -> tuple[list[int], list[float]]:
        """(directions, prices) of all drops down to these ``ranks`` of the layers, in order.

        A price is what the drop adds to the loss, per parameter.
        """
        left = np.array([part.stop - part.start - ranks[name] for name, part in self._slices.items()])
        cost, order, prices = 0.5 * np.diag(self._hessian) - self._gradient + self._margin, [], []
        cost[left[self._owners] <= 0] = np.inf
        for _ in range(int(left.clip(min=0).sum())):
            gone = len(cost) - 1 - int(np.argmin((cost / self._sizes)[::-1]))
            order.append(gone)
            prices.append(float(cost[gone] / self._sizes[gone]))
            cost += self._hessian[gone]
            cost[gone] = np.inf
            owner = self._owners[gone]
            left[owner] -= 1
            if left[owner] == 0:
                cost[self._owners == owner] = np.inf
        return order, prices

    def values(self) -> dict[str, Tensor]:
        """{layer: (R,) descending}: values whose squares, per parameter, order all directions as the greedy does.

        Values never decrease along the drop order: a direction dropped after a more expensive one gets that one's
        value, plus a tie-breaker of 1e-9. A drop that lowers the loss gets only the tie-breaker. So targets can use the
        values like singular values.
        """
        order, prices = self.dropped(dict.fromkeys(self._slices, 1))
        # The directions that are never dropped: one in each layer.
        rest = [i for i in range(len(self._gradient)) if i not in set(order)]
        levels = np.maximum.accumulate(np.maximum([*prices, *[0.0] * len(rest)], 0.0))
        top = levels[-1] if len(levels) and levels[-1] > 0 else 1.0
        levels = levels + top * 1e-9 * np.arange(1, len(levels) + 1) / len(levels)
        worth = np.empty(len(levels))
        worth[[*order, *rest]] = levels
        roots = np.sqrt(worth * self._sizes)
        return {name: torch.from_numpy(np.sort(roots[part])[::-1].copy()) for name, part in self._slices.items()}

    def kept(self, ranks: Mapping[str, int]) -> dict[str, Tensor]:
        """{layer: (rank,) the directions that the greedy keeps at these ranks, ascending}; ``ranks`` has all layers."""
        gone = np.zeros(len(self._gradient), dtype=bool)
        gone[self.dropped(ranks)[0]] = True
        return {name: torch.from_numpy(np.flatnonzero(~gone[part])) for name, part in self._slices.items()}

    def estimated_loss(self, kept: Mapping[str, Tensor]) -> dict[str, LossChange]:
        """{layer: its part of the estimated change of the loss} if each layer keeps these directions."""
        first, moved = {}, {}
        for name, part in self._slices.items():
            gone = np.ones(part.stop - part.start)
            gone[kept[name].numpy()] = 0.0
            first[name], moved[name] = -float(gone @ self._gradient[part]), self._roots[:, part] @ gone
        whole: np.ndarray = sum(moved.values(), np.zeros(len(self._roots)))
        return {
            name: LossChange(first[name], 0.5 * float(own @ own), 0.5 * float(own @ (whole - own)))
            for name, own in moved.items()
        }
