"""Factors rounded to fewer bits, as files hold them and as they might: what the study of bits compares.

Beside NF4 there are the best levels for normal numbers, by Lloyd (1982) and Max (1960).
"""

from functools import lru_cache
from math import ceil, pi

import torch
from torch import Tensor

from dynrank.adapters.codebook import GROUP, NF4_LEVELS, decode, encode
from dynrank.adapters.precision import balanced, in_float8, power_of


@lru_cache
def levels(name: str) -> Tensor:
    """The levels of a codebook, ascending, (K,) float32, the largest is 1: ``nf4``, or ``normal4`` for 4 bits."""
    if name == "nf4":
        return torch.tensor(NF4_LEVELS)
    count = 2 ** int(name.removeprefix("normal"))
    found = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    for _ in range(10_000):
        # Each level becomes the mean of the normal numbers that are nearest to it.
        middle = (found[1:] + found[:-1]) / 2
        edges = torch.cat([middle.new_tensor([-torch.inf]), middle, middle.new_tensor([torch.inf])])
        density = (-edges.square() / 2).exp() / (2 * pi) ** 0.5
        new = -density.diff() / torch.special.ndtr(edges).diff()
        if torch.allclose(new, found, rtol=0, atol=1e-12):
            break
        found = new
    made: Tensor = (found / found[-1]).float()
    return made


def rounded(lora_B: Tensor, lora_A: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """(B (O, R), A (R, I)) float32, rounded as a file of ``form`` holds them, after they were balanced.

    ``form`` is ``bfloat16`` (not balanced), ``float8_e4m3fn``, ``nf4``, or ``normal4``, ``normal3``, ... for that many
    bits. A group of 64 numbers belongs to one direction. :func:`bits_of` says how many bits it costs.
    """
    if form == "bfloat16":
        return lora_B.bfloat16().float(), lora_A.bfloat16().float()
    if form == "float8_e4m3fn":
        b_OR, a_RI, power = in_float8(lora_B, lora_A)
        return b_OR.float() * 2.0**-power, a_RI.float() * 2.0**-power
    book = levels(form)
    b_OR, a_RI = balanced(lora_B, lora_A)
    # So that no scale is too small for float16.
    size = 2.0 ** power_of(b_OR, a_RI)
    b_RO = decode(*encode(b_OR.mT * size, book), book)
    return b_RO.mT / size, decode(*encode(a_RI * size, book), book) / size


def bits_of(lora_B: Tensor, lora_A: Tensor, form: str) -> int:
    """How many bits the two factors take in a file of ``form``, scales counted."""
    numbers = lora_A.numel() + lora_B.numel()
    if form in ("bfloat16", "float8_e4m3fn"):
        return numbers * (16 if form == "bfloat16" else 8)
    groups = sum(ceil(width / GROUP) for width in (lora_A.shape[1], lora_B.shape[0])) * len(lora_A)
    return numbers * (len(levels(form)) - 1).bit_length() + 16 * groups
