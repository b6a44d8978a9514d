"""Triggers on the factors themselves: their spectrum has a small tail, or their leading directions have settled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dynrank.errors import Count, diverged, validated
from dynrank.linalg import energy_kept, singular_values, truncate_product
from dynrank.triggers.base import Trigger

Factors = Mapping[str, tuple[Tensor, Tensor]]  # name -> (lora_B, lora_A)
Part = Annotated[float, Field(gt=0, lt=1)]


@validated("schedule.trigger", frozen=False)
class TailEnergy(Trigger):
    """True once the energy (sum of squared singular values) beyond ``rank`` is at most ``share``, a mean over layers.

    Layers whose update is still zero don't count; while all are, nothing fires.

    Args:
        rank: directions that are not tail.
        share: of the energy, in (0, 1).
        every: optimizer steps between looks.
    """

    rank: Count = 16
    share: Part = 0.05
    every: Count = 50

    @property
    def reason(self) -> str:
        return f"energy beyond rank {self.rank} at most {self.share:g}"

    def fires(self, factors: Factors) -> bool:
        spectra = [_spectrum(name, *pair) for name, pair in factors.items()]
        tails = [1 - energy_kept(values, self.rank) for values in spectra if values[0] > 0]
        return bool(tails) and sum(tails) / len(tails) <= self.share


@validated("schedule.trigger", frozen=False)
class SubspaceStable(Trigger):
    """True once the leading ``rank`` right singular directions overlap by ``overlap`` with those of the look before.

    The overlap of two subspaces with orthonormal bases V, W is ``||V^T W||_F^2 / rank``, in [0, 1]; mean over layers.
    Layers whose update is still zero don't count; while all are, nothing fires.

    Args:
        rank: leading directions compared.
        overlap: in (0, 1).
        every: optimizer steps between looks.
    """

    rank: Count = 16
    overlap: Part = 0.95
    every: Count = 50
    _bases: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)  # name -> (d_in, rank) float32

    @property
    def reason(self) -> str:
        return f"leading {self.rank} directions settled"

    def fires(self, factors: Factors) -> bool:
        bases = {}
        for name, (lora_B, lora_A) in factors.items():
            if _spectrum(name, lora_B, lora_A)[0] == 0:
                continue  # the rows of a fresh layer don't move, which says nothing
            leading = truncate_product(lora_B, lora_A, min(self.rank, lora_A.shape[0])).lora_A.double()
            bases[name] = torch.linalg.qr(leading.mT).Q.float()
        before, self._bases = self._bases, bases
        overlaps = [
            float((before[name].mT @ basis).square().sum() / basis.shape[1])
            for name, basis in bases.items()
            if name in before and before[name].shape == basis.shape
        ]
        return bool(overlaps) and sum(overlaps) / len(overlaps) >= self.overlap


def _spectrum(name: str, lora_B: Tensor, lora_A: Tensor) -> Tensor:
    try:
        return singular_values(lora_B, lora_A)
    except ValueError as error:
        raise diverged(name, error) from error
