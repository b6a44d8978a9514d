"""Dropout whose mask is a function of (seed, element) and is computed again wherever it is needed, never stored.

Two elements share the hash of a counter: MurmurHash3's 32-bit finaliser, with one half of the seed mixed in before it
and the other in the middle. That is fifteen elementwise operations on 2 bytes per element, several times less than
torch's own dropout takes on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw_seed", "keep_mask", "keep_rate", "masked"]

STEPS = 2**15  # a word's 15 bits; keep rates are multiples of 1 / STEPS
# Words of a chunk on a CPU: few enough to stay in a core's cache from one operation to the next, and for torch not to
# share an operation among threads, which on a machine that is busy otherwise wait for each other at every one.
CPU_CHUNK = 2**15
WORD_OF = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def draw_seed(device: torch.device) -> Tensor:
    """A seed from the device's default generator, so that it comes back with the generator's state.

    Returns:
        0-d int64 tensor on ``device``; it is never read on the host.
    """
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def keep_rate(p: float) -> float:
    """The share of elements that dropout with probability ``p`` really keeps: 1 - p to the nearest 1 / 32768."""
    return round((1 - p) * STEPS) / STEPS


def keep_mask(rows: int, columns: int, p: float, seed: Tensor) -> Tensor:
    """-1 (all bits) where an element is kept, 0 where it is dropped.

    Args:
        rows: of the tensor to drop from.
        columns: likewise; the mask depends on the row-major index alone.
        p: probability of dropping, in [0, 1].
        seed: 0-d int64 tensor, on the device of the mask.

    Returns:
        (rows, columns) int16.
    """
    elements = rows * columns
    bits = torch.empty(elements + elements % 2, dtype=torch.int16, device=seed.device)
    words, (key, second_key) = bits.view(torch.int32), seed.reshape(1).view(torch.int32)
    chunk = CPU_CHUNK if seed.device.type == "cpu" else 2 ** max(0, len(words) - 1).bit_length()
    counter = torch.arange(min(chunk, len(words)), dtype=torch.int32, device=seed.device)
    buffer = torch.empty_like(counter)
    for start in range(0, len(words), chunk):
        part = words[start : start + chunk]
        high = buffer[: len(part)]
        # start is a multiple of a power of two above the counter, so ^ adds them
        torch.bitwise_xor(counter[: len(part)], key ^ start, out=part)
        _fold(part, 16, high).mul_(-0x7A143595).bitwise_xor_(second_key)
        _fold(part, 13, high).mul_(-0x3D4D51CB)
        part.bitwise_xor_(torch.bitwise_right_shift(part, 16, out=high))  # what its sign adds above goes at the end
    bits.bitwise_and_(STEPS - 1).sub_(round((1 - p) * STEPS)).bitwise_right_shift_(15)  # the sign of bits - threshold
    return bits[:elements].view(rows, columns)


def _fold(words: Tensor, shift: int, high: Tensor) -> Tensor:
    torch.bitwise_right_shift(words, shift, out=high)  # keeps the sign of an int32, which the next line drops
    return words.bitwise_xor_(high.bitwise_and_((1 << (32 - shift)) - 1))


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` with zeros where it is dropped, not rescaled; an infinity or NaN that is dropped is zero, too."""
    word = WORD_OF[x.itemsize]
    return mask.to(word, copy=True).bitwise_and_(x.view(word)).view(x.dtype)
