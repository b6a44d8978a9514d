"""Dropout that draws its mask again from a seed in forward and in backward, and never stores it between the two.

For large tensors on a CPU numpy's SFC64 draws 16 bits per element, in a tenth of the time of torch's own dropout. For
small tensors and on other devices a torch generator with the same seed draws the mask.
"""

from typing import Any

import numpy as np
import torch
from numpy.random import SFC64
from numpy.random.bit_generator import ISeedSequence
from torch import Tensor

# A random number has 15 bits; the sixteenth is free for the sign, which is set when a threshold is subtracted.
STEPS = 2**15
# Up to this many elements, torch's calls take less time than numpy's.
SMALL = 4096
_WORD_OF = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def draw_seed(device: torch.device) -> Tensor:
    """A seed from the device's default generator, 0-d int64; restoring the generator's state repeats it."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def keep_rate(p: float) -> float:
    """The share of elements that dropout with probability ``p`` keeps: 1 - p rounded to a multiple of 1 / 32768."""
    return round((1 - p) * STEPS) / STEPS


def random_mask(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """A mask for :func:`masked` that drops elements of ``x`` with probability ``p``, in [0, 1].

    An element's mask depends on the seed, its index in the flattened x, the device, and whether x is small.

    Returns:
        A tensor in the shape of x. From numpy: int16, all bits set where an element is kept. From torch: bool, true
        where an element is dropped.
    """
    rate = keep_rate(p)
    start = int(seed) & 0xFFFF_FFFF_FFFF_FFFF
    if x.device.type != "cpu" or x.numel() <= SMALL:
        generator = torch.Generator(x.device).manual_seed(start)
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - rate, generator=generator)
    count = x.numel()
    # numpy's type stubs accept only numpy's own seed sequences.
    sequence: Any = _Seed(start)
    bits = SFC64(sequence).random_raw((count + 3) // 4).view(np.int16)
    bits &= STEPS - 1
    bits += -round(rate * STEPS)
    # The shift copies the sign into all bits; the sign is set where the number is below the threshold.
    bits >>= 15
    return torch.from_numpy(bits[:count].reshape(x.shape))


def masked(x: Tensor, mask: Tensor, *, in_place: bool = False) -> Tensor:
    """``x`` with zeros where ``mask`` drops an element, not rescaled; a dropped infinity or NaN becomes zero, too."""
    if mask.dtype == torch.bool:
        return x.masked_fill_(mask, 0) if in_place else x.masked_fill(mask, 0)
    # numpy widens the mask within the operation; torch takes twice the time.
    words = x.view(_WORD_OF[x.itemsize]).numpy()
    kept = np.bitwise_and(words, mask.numpy(), out=words if in_place else None)
    return x if in_place else torch.from_numpy(kept).view(x.dtype)


class _Seed(ISeedSequence):
    """A seed sequence that puts the seed itself into all of SFC64's state; numpy then discards twelve numbers."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def generate_state(self, n_words: int, dtype: Any = np.uint64) -> Any:
        return np.full(n_words, self._seed, dtype)
