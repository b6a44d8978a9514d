"""Dropout whose mask is drawn again from its seed wherever it is needed, and never stored between forward and backward.

Large tensors of a CPU are masked by 16 bits for each element from numpy's SFC64, which takes a tenth of the time of
torch's own dropout. Small ones, and those of other devices, by torch, from a generator of its own with that seed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.random import SFC64
from numpy.random.bit_generator import ISeedSequence
from torch import Tensor

# A random number has a sign and 15 bits, so that a threshold can be subtracted from it.
STEPS = 2**15
# Up to so many elements, a few calls of torch take less time than numpy's faster ones.
SMALL = 4096
_WORD_OF = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def draw_seed(device: torch.device) -> Tensor:
    """A seed from the device's default generator, so that it comes back with the generator's state; 0-d int64."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def keep_rate(p: float) -> float:
    """The share of elements that dropout with probability ``p`` really keeps: 1 - p to the nearest 1 / 32768."""
    return round((1 - p) * STEPS) / STEPS


def random_mask(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """What :func:`masked` needs for dropping elements of ``x`` with probability ``p``, in [0, 1].

    It depends on the seed, the number of elements before one in x, the device, and whether x is small.

    Returns:
        In the shape of x: int16, all bits set where an element is kept; by torch, bool, true where it is dropped.
    """
    rate, start = keep_rate(p), int(seed) & 0xFFFF_FFFF_FFFF_FFFF
    if x.device.type != "cpu" or x.numel() <= SMALL:
        generator = torch.Generator(x.device).manual_seed(start)
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - rate, generator=generator)
    count = x.numel()
    # The stubs of numpy know its own seed sequences only.
    sequence: Any = _Seed(start)
    bits = SFC64(sequence).random_raw((count + 3) // 4).view(np.int16)
    bits &= STEPS - 1
    bits += -round(rate * STEPS)
    # Only the sign is left; it is set where the number is below the threshold.
    bits >>= 15
    return torch.from_numpy(bits[:count].reshape(x.shape))


def masked(x: Tensor, mask: Tensor, *, in_place: bool = False) -> Tensor:
    """``x`` with zeros where ``mask`` says so, not rescaled; an infinity or NaN that is dropped is zero, too."""
    if mask.dtype == torch.bool:
        return x.masked_fill_(mask, 0) if in_place else x.masked_fill(mask, 0)
    # numpy widens the mask while it multiplies. torch takes twice the time for that.
    words = x.view(_WORD_OF[x.itemsize]).numpy()
    kept = np.bitwise_and(words, mask.numpy(), out=words if in_place else None)
    return x if in_place else torch.from_numpy(kept).view(x.dtype)


class _Seed(ISeedSequence):
    """The seed itself as SFC64's first state, as its author starts it; numpy then throws away twelve numbers."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def generate_state(self, n_words: int, dtype: Any = np.uint64) -> Any:
        return np.full(n_words, self._seed, dtype)
