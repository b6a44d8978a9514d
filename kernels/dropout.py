"""Dropout whose mask is a function of (seed, element) and is computed again wherever it is needed, never stored.

Two elements share the hash of a counter: MurmurHash3's 32-bit finaliser, with one half of the seed mixed in before it
and the other in the middle. On a CPU that takes several times less than torch's own dropout.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["draw_seed", "keep_mask", "keep_rate", "masked"]

STEPS = 2**15  # a word's 15 bits; keep rates are multiples of 1 / STEPS
CPU_CHUNK = 2**15  # words of a chunk on a CPU: few enough to stay in a core's cache from one operation to the next
_WORD_OF = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def draw_seed(device: torch.device) -> Tensor:
    """A seed from the device's default generator, so that it comes back with the generator's state.

    Returns:
        0-d int64 tensor on ``device``; on a GPU it is never read by the host.
    """
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def keep_rate(p: float) -> float:
    """The share of elements that dropout with probability ``p`` really keeps: 1 - p to the nearest 1 / 32768."""
    return round((1 - p) * STEPS) / STEPS


def keep_mask(rows: int, columns: int, p: float, seed: Tensor, itemsize: int = 2) -> Tensor:
    """-1 (all bits) where an element is kept, 0 where it is dropped.

    Args:
        rows: of the tensor to drop from.
        columns: of the tensor to drop from; the mask depends on the row-major index alone.
        p: probability of dropping, in [0, 1].
        seed: 0-d int64 tensor, on the device of the mask.
        itemsize: bytes of an element of that tensor.

    Returns:
        (rows, columns), integers of ``itemsize`` bytes.
    """
    elements = rows * columns
    on_cpu = seed.device.type == "cpu" and type(seed) is Tensor  # and has values, unlike a fake one
    bits = (_bits_by_numpy if on_cpu else _bits_by_torch)((elements + 1) // 2, seed, round((1 - p) * STEPS))
    return bits[:elements].view(rows, columns).to(_WORD_OF[itemsize])


def _bits_by_numpy(count: int, seed: Tensor, threshold: int) -> Tensor:
    """Two masks of 16 bits from each of ``count`` hashed words; numpy starts an operation sooner than torch does."""
    bits = np.empty(2 * count, dtype=np.int16)
    words, value = bits.view(np.uint32), int(seed)
    key, second_key = value & 0xFFFFFFFF, value >> 32 & 0xFFFFFFFF
    counter = np.arange(min(count, CPU_CHUNK), dtype=np.uint32)
    buffer = np.empty_like(counter)
    for start in range(0, count, CPU_CHUNK):
        part = words[start : start + CPU_CHUNK]
        high, pair = buffer[: len(part)], part.view(np.int16)
        np.bitwise_xor(counter[: len(part)], key ^ start, out=part)  # start has bits above the counter's only
        part ^= np.right_shift(part, 16, out=high)
        part *= 0x85EBCA6B
        part ^= second_key
        part ^= np.right_shift(part, 13, out=high)
        part *= 0xC2B2AE35
        part ^= np.right_shift(part.view(np.int32), 16, out=high.view(np.int32)).view(np.uint32)
        pair &= STEPS - 1
        pair += -threshold
        pair >>= 15  # the sign, which is set below the threshold
    return torch.from_numpy(bits)


def _bits_by_torch(count: int, seed: Tensor, threshold: int) -> Tensor:
    """What :func:`_bits_by_numpy` computes, on any device, by int32, whose shift to the right keeps the sign."""
    key, second_key = seed.reshape(1).view(torch.int32)
    words = torch.arange(count, dtype=torch.int32, device=seed.device).bitwise_xor_(key)
    words.bitwise_xor_((words >> 16).bitwise_and_(0xFFFF)).mul_(-0x7A143595).bitwise_xor_(second_key)
    words.bitwise_xor_((words >> 13).bitwise_and_(0x7FFFF)).mul_(-0x3D4D51CB)
    words.bitwise_xor_(words >> 16)
    return words.view(torch.int16).bitwise_and_(STEPS - 1).sub_(threshold).bitwise_right_shift_(15)


def masked(x: Tensor, mask: Tensor, *, in_place: bool = False) -> Tensor:
    """``x`` with zeros where ``mask`` is 0, not rescaled; an infinity or NaN that is dropped is zero, too."""
    words = x.view(mask.dtype)
    return (words.bitwise_and_(mask) if in_place else words & mask).view(x.dtype)
