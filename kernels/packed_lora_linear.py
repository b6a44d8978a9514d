"""The fused op for a frozen weight that is kept packed: it is unpacked for each product, and never saved.

Shape suffixes: M = tokens, I = d_in, O = d_out, R = rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynrank.kernels.lora_linear import Tap, check_operands, gradients, in_working_dtypes, product, report

__all__ = ["packed_lora_linear"]


def packed_lora_linear(
    x: Tensor,
    unpack: Callable[[], Tensor],
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    *,
    backend: str = "auto",
    tap: Tap | None = None,
) -> Tensor:
    """:func:`dynrank.kernels.lora_linear.lora_linear` with the weight that ``unpack()`` returns, (O, I) of any dtype.

    ``unpack`` is called once in forward, and once in backward where x needs a gradient; what it returns is freed
    after the product (QLoRA, arXiv:2305.14314, section 3).

    Raises:
        ValueError: as the op does.
    """
    d_out, d_in = lora_B.shape[0], lora_A.shape[1]
    check_operands(x, (d_out, d_in), bias, lora_A, lora_B, dropout, seed)
    bias = None if bias is None else bias.to(x.dtype)
    x, bias, lora_A, lora_B, backend = in_working_dtypes(x, x.dtype, bias, lora_A, lora_B, dropout, backend)
    x_MI, p = x.reshape(-1, d_in), float(dropout)
    y_MO, s_MR = _PackedLoRALinear.apply(x_MI, unpack, bias, lora_A, lora_B, scaling, p, seed if p else None, backend)  # type: ignore[no-untyped-call]
    report(tap, y_MO, s_MR, lora_B, scaling)
    result: Tensor = y_MO if x.ndim == 2 else y_MO.view(*x.shape[:-1], d_out)
    return result


class _PackedLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_MI: Tensor,
        unpack: Callable[[], Tensor],
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        p: float,
        seed: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        y_MO, s_MR = product(x_MI, unpack(), bias, lora_A, lora_B, scaling, p, seed, backend)
        ctx.mark_non_differentiable(s_MR)
        ctx.save_for_backward(x_MI, s_MR, lora_A, lora_B, seed)
        ctx.unpack, ctx.scaling, ctx.p, ctx.backend = unpack, scaling, p, backend
        return y_MO, s_MR

    @staticmethod
    @once_differentiable  # drop(x) A^T is kept as a number, not as a function of x
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_MI, s_MR, lora_A, lora_B, seed = ctx.saved_tensors
        need_x, _, _, need_A, need_B, *_ = ctx.needs_input_grad
        needs = (need_x, need_A, need_B)
        dx, d_A, d_B = gradients(
            grads[0], x_MI, s_MR, ctx.unpack, lora_A, lora_B, ctx.scaling, ctx.p, seed, ctx.backend, needs
        )
        return dx, None, None, d_A, d_B, None, None, None, None
