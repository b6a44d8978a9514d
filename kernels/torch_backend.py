"""The rank-sized products of a LoRA layer, and its dropout, through ATen: on any device that torch has.

Shape suffixes: M = tokens, I = d_in, O = d_out, N = either, R = rank. Factors are in x's dtype, or in a wider one that
the products are then made in; x itself is never kept in it. Triton's kernels are behind the same functions, in
:mod:`dynrank.kernels.triton_launch`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dynrank.kernels.dropout import keep_mask, keep_rate, masked

__all__ = ["NO_DROPOUT", "Dropout", "dropout", "expand", "grad_A", "grad_S_and_B", "shrink"]


class Dropout(NamedTuple):
    """What x is multiplied by."""

    mask: Tensor | None  # (M, I), see masked(); None keeps everything
    rescale: float  # 1 / keep rate


NO_DROPOUT = Dropout(None, 1.0)


def dropout(x_MI: Tensor, p: float, seed: Tensor | None) -> Dropout:
    """The dropout of ``x_MI`` with probability ``p``; none where there is no seed."""
    if seed is None:
        return NO_DROPOUT
    keep = keep_rate(p)
    return Dropout(keep_mask(x_MI.shape[0], x_MI.shape[1], p, seed, x_MI.itemsize), 1 / keep if keep else 0.0)


def shrink(x_MI: Tensor, lora_A: Tensor, dropout: Dropout) -> Tensor:
    """``drop(x) A^T``, (M, R) in the factor's dtype."""
    x_MI = x_MI if dropout.mask is None else masked(x_MI, dropout.mask)
    return _product(_in(lora_A.dtype, x_MI), lora_A.mT, dropout.rescale)


def expand(
    s_MR: Tensor,
    factor_RN: Tensor,
    scale: float,
    bias_N: Tensor | None,
    dropout: Dropout,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """``drop(scale * s factor) + bias``, (M, N) in ``dtype``, written into ``out`` if there is one."""
    s_MR, factor_RN = _in(dtype, s_MR), _in(dtype, factor_RN)
    if bias_N is None:
        out = _product(s_MR, factor_RN, scale * dropout.rescale, out)
    else:
        out = torch.addmm(bias_N, s_MR, factor_RN, alpha=scale * dropout.rescale, out=out)
    return out if dropout.mask is None else masked(out, dropout.mask, in_place=True)


def grad_S_and_B(
    dy_MO: Tensor, s_MR: Tensor, lora_B: Tensor, scaling: float, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """``scaling * dy B``, (M, R), and ``scaling * dy^T s``, (O, R), as ``needs`` says, in the factor's dtype."""
    need_S, need_B = needs
    dy_MO = _in(lora_B.dtype, dy_MO)
    ds_MR = _product(dy_MO, lora_B, scaling) if need_S else None
    # (S^T dY)^T keeps the long dimension contiguous: several times faster on CPU than dY^T S
    d_B = _product(s_MR.mT, dy_MO, scaling).mT.contiguous() if need_B else None
    return ds_MR, d_B


def grad_A(ds_MR: Tensor, x_MI: Tensor, dtype: torch.dtype, dropout: Dropout) -> Tensor:
    """``ds^T drop(x)``, (R, I) in ``dtype``, which is that of ``ds_MR``."""
    x_MI = x_MI if dropout.mask is None else masked(x_MI, dropout.mask)
    return _product(ds_MR.mT, _in(dtype, x_MI), dropout.rescale)


def _product(left: Tensor, right: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    if scale == 1 and out is None:
        return torch.mm(left, right)
    out = left.new_empty(left.shape[0], right.shape[1]) if out is None else out
    return out.addmm_(left, right, beta=0, alpha=scale)


def _in(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # a call of torch takes longer than the question
