"""The same update in fewer bits: factors in bfloat16 or in float8, which PEFT loads as they are.

Shape suffixes: O = d_out, I = d_in, R = rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import frexp, hypot
from typing import Literal

import torch
from torch import Tensor

from dynrank.errors import ConfigurationError
from dynrank.linalg import finite, joined, product_norm, products, truncate_product

FLOAT8 = torch.float8_e4m3fn
# The dtypes of files, by their names on the command line.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8_e4m3fn": FLOAT8}
# Codes of 4 bits, which only dynrank reads (:mod:`.packed`).
NF4: Literal["nf4"] = "nf4"
FileDtype = torch.dtype | Literal["nf4"]
# float8_e4m3fn has 4 significant bits, and numbers from 2^-6 (with fewer bits from 2^-9) to 448. The largest number of
# a layer is put between 2^4 and 2^5. So a direction keeps its bits down to a thousandth of the largest one, and the
# products of a forward in float16 stay far from overflow.
_LARGEST = 5
# 4 to this power is a number of float32, in which a scaling is multiplied.
MOST_POWER = 50


@dataclass(frozen=True)
class Rounding:
    """How far the updates of a file are from those that it was made of.

    Attributes:
        layers: {layer: Frobenius norm of the difference, as a share of the update's}; 0 for an update of zero.
        whole: the same for all layers together, scaling included.
    """

    layers: Mapping[str, float]
    whole: float

    def __str__(self) -> str:
        worst = max(self.layers, key=self.layers.__getitem__)
        return f"{self.whole:.2%} of the update, at most {self.layers[worst]:.2%} of a layer's ({worst})"


@dataclass(frozen=True)
class Rounded:
    """Factors as a file holds them; ``4^-power lora_B lora_A`` is the product.

    Attributes:
        lora_B: (O, R), in the dtype of the file; the products of experts are stacked, as in lora_A.
        lora_A: (R, I).
        power: 0, but for float8.
        error: Frobenius norm of the change of the product.
        norm: Frobenius norm of the product.
    """

    lora_B: Tensor
    lora_A: Tensor
    power: int
    error: float
    norm: float


def named_dtype(name: str, *, packed: bool = False) -> FileDtype:
    """The dtype that the command line calls ``name``. ``packed``: whether 4 bits are possible."""
    kinds: Mapping[str, FileDtype] = {**DTYPES, **({NF4: NF4} if packed else {})}
    if name not in kinds:
        raise ConfigurationError(f"dtype must be one of {', '.join(kinds)}, got {name!r}", "dtype")
    return kinds[name]


def check_file_dtype(dtype: FileDtype | None, *, packed: bool = False) -> None:
    """Refuse a dtype in which adapters are not written; None is none. ``packed``: whether 4 bits are possible."""
    known = [*DTYPES.values(), *([NF4] if packed else [])]
    if dtype is not None and dtype not in known:
        raise ConfigurationError(f"dtype must be one of {', '.join(map(str, known))}, got {dtype!r}", "dtype")


def balanced(lora_B: Tensor, lora_A: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """Factors of the same product whose directions are orthogonal and of equal norm in both, float32.

    They are the singular vectors times the roots of the singular values. To round them changes the product by at most
    about sqrt(2) times the relative error of the numbers, in the Frobenius norm. In other factors large directions may
    cancel each other, but their errors do not. A direction in which the product is zero keeps its row of A, as long as
    that of the largest direction, so that it can still be trained.

    Args:
        lora_B: (O, R), floating point.
        lora_A: (R, I), floating point; R <= min(O, I).
        count: how many products they stack (:func:`dynrank.linalg.split`).
    """
    pairs = [_balanced(*pair) for pair in products(lora_B, lora_A, count)]
    return joined(torch.stack([b.mT for b, _ in pairs]), 1), joined(torch.stack([a for _, a in pairs]), 0)


def _balanced(lora_B: Tensor, lora_A: Tensor) -> tuple[Tensor, Tensor]:
    change = truncate_product(lora_B.float(), lora_A.float(), len(lora_A))
    b_OR = change.lora_B
    a_RI = change.lora_A
    norms = torch.maximum(b_OR.norm(dim=0), a_RI.norm(dim=1))
    idle = (b_OR.norm(dim=0) == 0) | (a_RI.norm(dim=1) == 0)
    factor = torch.where(idle & (norms > 0), norms[0] / norms, 1.0)
    return b_OR * factor, a_RI * factor[:, None]


def power_of(*factors: Tensor) -> int:
    """The exponent p for which the factors times 2^p fit float8_e4m3fn best; the scaling times 4^-p undoes it."""
    largest = max(float(factor.abs().max()) for factor in factors)
    if largest == 0:
        return 0
    # Rounded to the bits of float8 first, so that rounded factors have the same exponent as before.
    share, exponent = frexp(largest)
    power = _LARGEST - exponent - (round(share * 16) == 16)
    return max(-MOST_POWER, min(power, MOST_POWER))


def in_float8(lora_B: Tensor, lora_A: Tensor, count: int = 1, power: int | None = None) -> tuple[Tensor, Tensor, int]:
    """(B, A, p): balanced factors times 2^p in float8_e4m3fn; ``4^-p B A`` is the product, rounded.

    Factors that are exact in float8 already stay as they are. ``count`` is the number of products that the factors
    stack (:func:`dynrank.linalg.split`). ``power`` is the exponent; None for the one that fits best.
    """

    def cast(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, int]:
        exponent = power_of(*pair) if power is None else power
        b_OR, a_RI = (factor * 2.0**exponent for factor in pair)
        return b_OR.to(FLOAT8), a_RI.to(FLOAT8), exponent

    lora_B = lora_B.float()
    lora_A = lora_A.float()
    new_B, new_A, made = cast((lora_B, lora_A))
    if torch.equal(new_B.float(), lora_B * 2.0**made) and torch.equal(new_A.float(), lora_A * 2.0**made):
        return new_B, new_A, made
    return cast(balanced(lora_B, lora_A, count))


def in_dtype(lora_B: Tensor, lora_A: Tensor, dtype: torch.dtype, count: int = 1, power: int | None = None) -> Rounded:
    """The factors as a file of ``dtype`` holds them, and how far their product is from the present one."""
    if dtype == FLOAT8:
        new_B, new_A, made = in_float8(lora_B, lora_A, count, power)
    else:
        new_B = lora_B.to(dtype)
        new_A = lora_A.to(dtype)
        made = 0
    if not (finite(new_B) and finite(new_A)):
        raise ConfigurationError(f"factors are too large for {dtype}", "dtype")
    return Rounded(new_B, new_A, made, *compared((lora_B, lora_A), (new_B, new_A), made, count))


def compared(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], power: int, count: int = 1) -> tuple[float, float]:
    """(error, norm) of :class:`Rounded` for the factors (lora_B, lora_A) before and after."""
    size = 2.0**-power
    before = products(old[0].double(), old[1].double(), count)
    after = products(new[0].double() * size, new[1].double() * size, count)
    norms = [product_norm(*pair) for pair in before]
    errors = [
        product_norm(torch.cat([old_B, -b], 1), torch.cat([old_A, a]))
        for (old_B, old_A), (b, a) in zip(before, after, strict=True)
    ]
    return hypot(*errors), hypot(*norms)


def rounding(layers: Mapping[str, tuple[Rounded, float]]) -> Rounding:
    """How far all layers are from what they were made of; ``layers`` is {layer: (its factors, its scaling)}."""
    shares = {name: factors.error / factors.norm if factors.norm else 0.0 for name, (factors, _) in layers.items()}
    error = hypot(*(factors.error * scaling for factors, scaling in layers.values()))
    norm = hypot(*(factors.norm * scaling for factors, scaling in layers.values()))
    return Rounding(shares, error / norm if norm else 0.0)


def head_in(value: Tensor, dtype: FileDtype) -> Tensor:
    """A parameter that is stored whole, as a file of ``dtype`` holds it: in bfloat16 where factors are in fewer bits.

    It has no scaling that could undo a power of two. Whole numbers stay as they are.
    """
    kind = torch.bfloat16 if dtype in (FLOAT8, NF4) else dtype
    return value.to(kind) if isinstance(kind, torch.dtype) and value.is_floating_point() else value
