"""The same updates with other factors, for programs that do not read rank_pattern or alpha_pattern."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from dynrank.adapters.read import Adapter
from dynrank.adapters.stored import Factors
from dynrank.linalg import joined, split


def stored_factors(adapter: Adapter) -> dict[str, Factors]:
    """The unchanged factors of every layer of a stored adapter."""
    factors = {}
    for name, layer in adapter.layers.items():
        lora_B, lora_A = adapter.factors(name)
        factors[name] = lora_A, lora_B, layer.scaling
    return factors


def one_scaling(layers: Mapping[str, Factors]) -> dict[str, Factors]:
    """Every layer at its own rank, all with the largest scaling, so that no factor grows.

    A program that reads only the global ``lora_alpha / r`` gets this scaling, and so does one that reads patterns.
    """
    scaling = max((own for *_, own in layers.values()), key=abs) or 1.0
    return {name: (lora_A, lora_B * (own / scaling), scaling) for name, (lora_A, lora_B, own) in layers.items()}


def padded(layers: Mapping[str, Factors], experts: Mapping[str, int], multiple: int = 1) -> dict[str, Factors]:
    """All layers with one scaling and the largest rank, rounded up to a ``multiple``, by rows of zeros.

    A program that divides alpha by the rows of each tensor gets the right scaling, too.

    Args:
        layers: {layer: its factors}.
        experts: {layer: how many products its factors stack}; each product gets the rank.
        multiple: the rank is a multiple of this.
    """
    ranks = {name: len(lora_A) // experts[name] for name, (lora_A, _, _) in layers.items()}
    rank = max(ranks.values())
    rank += -rank % multiple

    def filled(factor: Tensor, name: str, dim: int) -> Tensor:
        return joined(F.pad(split(factor, experts[name], dim), (0, 0, 0, rank - ranks[name])), dim)

    return {
        name: (filled(lora_A, name, 0), filled(lora_B, name, 1), scaling)
        for name, (lora_A, lora_B, scaling) in one_scaling(layers).items()
    }
