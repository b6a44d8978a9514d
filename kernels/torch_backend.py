"""The products of a LoRA layer with A and B, and its dropout, through ATen, on any device that torch supports.

Shape suffixes: M = tokens, I = d_in, O = d_out, N = either, R = rank. Factors have the dtype of x, or a wider one. With
wider factors the products are made in their dtype on a CPU (a wider copy of x is never kept). On other devices they are
made in the dtype of x by matrix instructions that sum in float32; the gradients of the factors are these sums.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Up to this many elements, bernoulli_ draws a mask in less time than 64 bits for four elements, on a CPU.
SMALL = 4096


class Dropout(NamedTuple):
    """Where elements become zero (bool; None keeps all), and the factor of the others, 1 / keep rate."""

    mask: Tensor | None
    rescale: float


NO_DROPOUT = Dropout(None, 1.0)


def seed_place(x: Tensor) -> torch.device:
    """The device of the seed: the CPU, because the host reads it and would have to wait for a GPU."""
    return torch.device("cpu")


def dropout(x_MI: Tensor, p: float, seed: Tensor | None) -> Dropout:
    """The dropout of ``x_MI`` with ``p`` rounded to a multiple of 1 / 65536; no dropout without a seed.

    An element's mask depends on the seed, its index in the flattened x, the device, and whether x is small. Forward and
    backward draw the mask again from the seed, so that it is never stored between the two.
    """
    kept = round((1.0 - p) * 65536)
    if seed is None or kept == 65536:
        return NO_DROPOUT
    generator = torch.Generator(x_MI.device).manual_seed(int(seed) & 0xFFFF_FFFF_FFFF_FFFF)
    if x_MI.device.type == "cpu" and x_MI.numel() > SMALL:
        # One draw serves four elements: this takes a third of the time of bernoulli_.
        draws = torch.empty((x_MI.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator)
        mask = draws.view(torch.int16)[: x_MI.numel()].view(x_MI.shape) >= kept - 32768
    else:
        mask = torch.empty(x_MI.shape, dtype=torch.bool, device=x_MI.device)
        mask.bernoulli_(1 - kept / 65536, generator=generator)
    return Dropout(mask, 65536 / kept if kept else 0.0)


def shrink(x_MI: Tensor, lora_A: Tensor, dropout: Dropout) -> Tensor:
    """``drop(x) A^T``, (M, R)."""
    x_MI = x_MI if dropout.mask is None else x_MI.masked_fill(dropout.mask, 0)
    # On a CPU, ATen accumulates in the wider dtype only if the inputs have it.
    dtype = lora_A.dtype if x_MI.device.type == "cpu" else x_MI.dtype
    return _product(_in(dtype, x_MI), _in(dtype, lora_A).mT, dropout.rescale, dtype)


def expand(
    s_MR: Tensor,
    factor_RN: Tensor,
    scale: float,
    bias_N: Tensor | None,
    dropout: Dropout,
    dtype: torch.dtype,
) -> Tensor:
    """``drop(scale * s factor + bias)``, (M, N) in ``dtype``, contiguous."""
    s_MR = _in(dtype, s_MR)
    factor_RN = _in(dtype, factor_RN)
    scale = scale * dropout.rescale
    if bias_N is None:
        out = _product(s_MR, factor_RN, scale, dtype)
    else:
        out = torch.addmm(bias_N, s_MR, factor_RN, alpha=scale)
    return out if dropout.mask is None else out.masked_fill_(dropout.mask, 0)


def grad_S_and_B(
    dy_MO: Tensor, s_MR: Tensor, lora_B: Tensor, scaling: float, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """``scaling * dy B`` in the shape of s, and ``scaling * dy^T s`` in that of B; None for what ``needs`` excludes."""
    need_S, need_B = needs
    dy_MO = _in(s_MR.dtype, dy_MO)
    d_B = None
    ds_MR = _product(dy_MO, _in(s_MR.dtype, lora_B), scaling, s_MR.dtype) if need_S else None
    # (s^T dy)^T reads the long dimension contiguously: on a CPU this is several times faster than dy^T s.
    if need_B:
        d_B = _product(s_MR.mT, dy_MO, scaling, lora_B.dtype).mT.contiguous()
    return ds_MR, d_B


def grad_A(ds_MR: Tensor, x_MI: Tensor, dtype: torch.dtype, dropout: Dropout) -> Tensor:
    """``ds^T drop(x)``, (R, I) in ``dtype``."""
    x_MI = x_MI if dropout.mask is None else x_MI.masked_fill(dropout.mask, 0)
    return _product(ds_MR.mT, _in(ds_MR.dtype, x_MI), dropout.rescale, dtype)


def _product(left: Tensor, right: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``scale * left right``, summed and stored in ``dtype``; on a CPU this must be the inputs' dtype."""
    dtypes = () if left.dtype == dtype else (dtype,)
    if scale == 1:
        return torch.mm(left, right, *dtypes)
    # With beta = 0 torch never reads this tensor, so one call multiplies and scales without an empty result.
    unread = left.new_empty(1, dtype=dtype)
    return torch.addmm(unread, left, right, *dtypes, beta=0, alpha=scale)


def _in(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    # This check takes less time than a call of torch that changes nothing.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
