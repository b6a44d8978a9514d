"""The rank-sized products of a LoRA layer, and its dropout, through ATen: on any device that torch has.

Shape suffixes: M = tokens, I = d_in, O = d_out, R = rank. The factors' dtype is x's, or a wider one, in which the
products are then made; x itself is never kept in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynrank.kernels.dropout import keep_mask, keep_rate, masked


def down(x_MI: Tensor, lora_A: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """``drop(x) A^T``, (M, R) in the factors' dtype."""
    if seed is None:
        return x_MI.to(lora_A.dtype) @ lora_A.mT
    dropped = masked(x_MI, keep_mask(x_MI.shape[0], x_MI.shape[1], p, seed))
    return (dropped.to(lora_A.dtype) @ lora_A.mT).mul_(_rescale(p))


def up(s_MR: Tensor, lora_B: Tensor, scaling: float, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``scaling s B^T + bias``, (M, O) in ``dtype``."""
    s_MR, B_RO = s_MR.to(dtype), (scaling * lora_B).to(dtype).mT
    return s_MR @ B_RO if bias is None else torch.addmm(bias, s_MR, B_RO)


def output_gradients(
    dy_MO: Tensor, s_MR: Tensor, lora_B: Tensor, scaling: float, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the update with respect to s, ``scaling dy B``, and to B, ``scaling dy^T s``, as ``needs`` says.

    Returns:
        (M, R) and (O, R) in the factors' dtype.
    """
    need_S, need_B = needs
    dy_MO = dy_MO.to(lora_B.dtype)
    ds_MR = dy_MO @ (scaling * lora_B) if need_S else None
    # (S^T dY)^T keeps the long dimension contiguous: several times faster on CPU than dY^T S
    d_B = (scaling * (s_MR.mT @ dy_MO)).mT.contiguous() if need_B else None
    return ds_MR, d_B


def input_gradients(
    ds_MR: Tensor, x_MI: Tensor, lora_A: Tensor, p: float, seed: Tensor | None, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the update with respect to x and A, as far as ``needs`` says; ``ds_MR`` may be changed.

    Returns:
        (M, I) in x's dtype, and (R, I) in the factors' dtype.
    """
    need_x, need_A = needs
    dx = d_A = None
    mask = None if seed is None else keep_mask(x_MI.shape[0], x_MI.shape[1], p, seed)
    if mask is not None:
        ds_MR.mul_(_rescale(p))
    if need_A:
        d_A = ds_MR.mT @ (x_MI if mask is None else masked(x_MI, mask)).to(ds_MR.dtype)
    if need_x:
        dx = ds_MR.to(x_MI.dtype) @ lora_A.to(x_MI.dtype)
        dx = dx if mask is None else masked(dx, mask)
    return dx, d_A


def _rescale(p: float) -> float:
    keep = keep_rate(p)
    return 1 / keep if keep else 0.0
