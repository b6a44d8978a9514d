"""The rank-sized products of a LoRA layer, and its dropout, through ATen: on any device that torch has.

Shape suffixes: M = tokens, I = d_in, O = d_out, N = either, R = rank. Factors are in x's dtype, or in a wider one. On a
CPU the products are then made in the wider one (x itself is never kept in it); on other devices in x's, by matrix
instructions that sum in float32, and the gradients of the factors are these sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dynrank.kernels.dropout import keep_rate, masked, random_mask


class Dropout(NamedTuple):
    """What x is multiplied by: a mask, see :func:`random_mask`, None for all ones; and 1 / keep rate."""

    mask: Tensor | None
    rescale: float


NO_DROPOUT = Dropout(None, 1.0)


def seed_place(x: Tensor) -> torch.device:
    """Where the seed of a mask for ``x`` has to be: the host reads it, and would wait for a GPU."""
    return torch.device("cpu")


def dropout(x_MI: Tensor, p: float, seed: Tensor | None) -> Dropout:
    """The dropout of ``x_MI`` with probability ``p``; none where there is no seed."""
    if seed is None:
        return NO_DROPOUT
    keep = keep_rate(p)
    return Dropout(random_mask(x_MI, p, seed), 1 / keep if keep else 0.0)


def shrink(x_MI: Tensor, lora_A: Tensor, dropout: Dropout) -> Tensor:
    """``drop(x) A^T``, (M, R)."""
    x_MI = x_MI if dropout.mask is None else masked(x_MI, dropout.mask)
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
    out: Tensor | None = None,
) -> Tensor:
    """``drop(scale * s factor + bias)``, (M, N) in ``dtype``, written into ``out`` if there is one."""
    s_MR, factor_RN, scale = _in(dtype, s_MR), _in(dtype, factor_RN), scale * dropout.rescale
    if bias_N is None:
        out = _product(s_MR, factor_RN, scale, dtype, out)
    else:
        out = torch.addmm(bias_N, s_MR, factor_RN, alpha=scale, out=out)
    return out if dropout.mask is None else masked(out, dropout.mask, in_place=True)


def grad_S_and_B(
    dy_MO: Tensor, s_MR: Tensor, lora_B: Tensor, scaling: float, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """``scaling * dy B``, (M, R) as s is, and ``scaling * dy^T s``, (O, R) as B is, where ``needs`` says so."""
    need_S, need_B = needs
    dy_MO, d_B = _in(s_MR.dtype, dy_MO), None
    ds_MR = _product(dy_MO, _in(s_MR.dtype, lora_B), scaling, s_MR.dtype) if need_S else None
    # Computed as (S^T dY)^T, which keeps the long dimension contiguous: on a CPU several times faster than dY^T S.
    if need_B:
        d_B = _product(s_MR.mT, dy_MO, scaling, lora_B.dtype).mT.contiguous()
    return ds_MR, d_B


def grad_A(ds_MR: Tensor, x_MI: Tensor, dtype: torch.dtype, dropout: Dropout) -> Tensor:
    """``ds^T drop(x)``, (R, I) in ``dtype``."""
    x_MI = x_MI if dropout.mask is None else masked(x_MI, dropout.mask)
    return _product(ds_MR.mT, _in(ds_MR.dtype, x_MI), dropout.rescale, dtype)


def _product(left: Tensor, right: Tensor, scale: float, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """``scale * left right``, summed and stored in ``dtype``; one that is not theirs is for GPUs alone."""
    dtypes = () if left.dtype == dtype else (dtype,)
    if scale == 1:
        return torch.mm(left, right, *dtypes, out=out)
    # beta = 0 means that this tensor is never read: one call multiplies and scales, and needs no empty result.
    unread = left.new_empty(1, dtype=dtype)
    return torch.addmm(unread, left, right, *dtypes, beta=0, alpha=scale, out=out)


def _in(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    # Asking takes less time than a call of torch that does nothing.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
