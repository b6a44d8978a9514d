"""Frozen linear plus low-rank update in one pass: ``y = x W^T + b + scaling * (x A^T) B^T``.

Shape suffixes: M = tokens, I = d_in, O = d_out, R = rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Tap", "lora_linear", "lora_linear_reference"]

Tap = Callable[[Tensor, Tensor], None]


def lora_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """The formula, one torch op after the other; what :func:`lora_linear` is tested against."""
    y = x @ weight.mT if bias is None else x @ weight.mT + bias
    return y + scaling * (x @ lora_A.mT @ lora_B.mT)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    tap: Tap | None = None,
) -> Tensor:
    """``x W^T + b + scaling * (x A^T) B^T`` with W and b frozen (Hu et al., arXiv:2106.09685, section 4.1).

    The update is expanded first and the frozen product accumulated into it (GEMM with beta = 1), which saves a
    read and a write of y and, in bfloat16, does not lose a small update to the rounding of a large y. Backward keeps x
    and x A^T only.

    Args:
        x: (..., I), any dtype that torch multiplies.
        weight: (O, I), the dtype of x; gets no gradient.
        bias: (O,) or None; gets no gradient.
        lora_A: (R, I), the dtype of x.
        lora_B: (O, R), the dtype of x.
        scaling: factor of the update.
        tap: called in backward with ``z = x A^T`` and the gradient at z, both (M, R), which backward has at hand.

    Returns:
        (..., O), the dtype of x.

    Raises:
        ValueError: if the dtypes differ or a shape does not fit.
    """
    if {x.dtype} != {weight.dtype, lora_A.dtype, lora_B.dtype, x.dtype if bias is None else bias.dtype}:
        raise ValueError(
            f"x, weight, lora_A and lora_B must have one dtype, got {x.dtype}, {weight.dtype}, {lora_A.dtype}, "
            f"{lora_B.dtype} (and the bias {None if bias is None else bias.dtype})"
        )
    (d_out, d_in), rank = weight.shape, lora_A.shape[0]
    if x.shape[-1] != d_in or lora_A.shape != (rank, d_in) or lora_B.shape != (d_out, rank):
        raise ValueError(
            f"x must be (..., {d_in}), lora_A (rank, {d_in}) and lora_B ({d_out}, rank) for a weight of "
            f"{[*weight.shape]}, got {[*x.shape]}, {[*lora_A.shape]} and {[*lora_B.shape]}"
        )
    if bias is not None and bias.shape != (d_out,):
        raise ValueError(f"bias must be ({d_out},), got {[*bias.shape]}")
    x_MI = x.reshape(-1, d_in)
    # reshaped out here: a view that leaves the Function could not be changed in place (ReLU(inplace=True))
    y_MO: Tensor = _LoRALinear.apply(x_MI, weight, bias, lora_A, lora_B, scaling, tap)  # type: ignore[no-untyped-call]
    return y_MO if x.ndim == 2 else y_MO.view(*x.shape[:-1], d_out)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_MI: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        tap: Tap | None,
    ) -> Tensor:
        s_MR = x_MI @ lora_A.mT
        scaled_B = scaling * lora_B
        y_MO = s_MR @ scaled_B.mT if bias is None else torch.addmm(bias, s_MR, scaled_B.mT)
        y_MO.addmm_(x_MI, weight.mT)
        ctx.save_for_backward(x_MI, s_MR, weight, lora_A, lora_B)
        ctx.scaling, ctx.tap = scaling, tap
        return y_MO

    @staticmethod
    @once_differentiable  # x A^T is kept as a number, not as a function of x
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_MI, s_MR, weight, lora_A, lora_B = ctx.saved_tensors
        need_x, _, _, need_A, need_B, _, _ = ctx.needs_input_grad
        (dy_MO,) = grads
        dx = d_A = d_B = None
        if need_x or need_A:
            ds_MR = dy_MO @ (ctx.scaling * lora_B)
            if ctx.tap is not None:
                ctx.tap(s_MR, ds_MR)
        if need_x:
            dx = (ds_MR @ lora_A).addmm_(dy_MO, weight)
        if need_A:
            d_A = ds_MR.mT @ x_MI
        if need_B:  # (S^T dY)^T keeps the long dimension contiguous: several times faster on CPU than dY^T S
            d_B = (ctx.scaling * (s_MR.mT @ dy_MO)).mT
        return dx, None, None, d_A, d_B, None, None
