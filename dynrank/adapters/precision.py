"""The same update in fewer bits: factors in bfloat16 or in float8, which PEFT loads as they are.

Shape suffixes: O = d_out, I = d_in, R = rank.
"""

from math import frexp

import torch
from torch import Tensor

from dynrank.linalg import truncate_product

# float8_e4m3fn has 4 significant bits, and numbers from 2^-6 (with fewer bits from 2^-9) to 448. The largest number of
# a layer is put between 2^4 and 2^5. So a direction keeps its bits down to a thousandth of the largest one, and the
# products of a forward in float16 stay far from overflow.
_LARGEST = 5


def balanced(lora_B: Tensor, lora_A: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product whose directions are orthogonal and of equal norm in both, float32.

    The singular vectors times the roots of the singular values: rounding of such factors changes the product by no more
    than sqrt(2) times the relative error of the numbers, in the Frobenius norm. In other factors large directions may
    cancel each other, and their errors do not. A direction in which the product is zero keeps its row of A, as long as
    that of the largest direction, so that it can still be trained.

    Args:
        lora_B: (O, R), floating point.
        lora_A: (R, I), floating point; R <= min(O, I).
    """
    change = truncate_product(lora_B.float(), lora_A.float(), len(lora_A))
    b_OR = change.lora_B
    a_RI = change.lora_A
    norms = torch.maximum(b_OR.norm(dim=0), a_RI.norm(dim=1))
    idle = (b_OR.norm(dim=0) == 0) | (a_RI.norm(dim=1) == 0)
    factor = torch.where(idle & (norms > 0), norms[0] / norms, 1.0)
    return b_OR * factor, a_RI * factor[:, None]


def power_for_float8(lora_B: Tensor, lora_A: Tensor) -> int:
    """The exponent p for which both factors times 2^p are best in float8_e4m3fn; the scaling times 4^-p undoes it."""
    largest = max(float(factor.abs().max()) for factor in (lora_B, lora_A))
    if largest == 0:
        return 0
    # Rounded to the bits of float8 first, so that rounded factors have the same exponent as before.
    share, exponent = frexp(largest)
    return _LARGEST - exponent - (round(share * 16) == 16)


def in_float8(lora_B: Tensor, lora_A: Tensor) -> tuple[Tensor, Tensor, int]:
    """(B, A, p): balanced factors times 2^p in float8_e4m3fn; ``4^-p B A`` is the product, rounded.

    Factors that are exact in float8 already stay as they are.
    """
    power = power_for_float8(lora_B, lora_A)
    kept = [(factor.float() * 2.0**power).to(torch.float8_e4m3fn) for factor in (lora_B, lora_A)]
    exact = all(
        torch.equal(new.float(), old.float() * 2.0**power) for new, old in zip(kept, (lora_B, lora_A), strict=True)
    )
    if not exact:
        pair = balanced(lora_B, lora_A)
        power = power_for_float8(*pair)
        kept = [(factor * 2.0**power).to(torch.float8_e4m3fn) for factor in pair]
    return kept[0], kept[1], power
