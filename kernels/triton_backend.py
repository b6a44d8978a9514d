"""The rank-sized products of a LoRA layer, and its dropout, by Triton's kernels.

The same functions as :mod:`dynrank.kernels.torch_backend` has. All operands have x's dtype; sums are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynrank.kernels.triton_launch import expand, grad_A, grad_S_and_B, shrink


def down(x_MI: Tensor, lora_A: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """``drop(x) A^T``, (M, R)."""
    return shrink(x_MI, lora_A, p, seed)


def up(s_MR: Tensor, lora_B: Tensor, scaling: float, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``scaling s B^T + bias``, (M, O); ``dtype`` is that of s."""
    return expand(s_MR, (scaling * lora_B).mT, bias, 0.0, None)


def output_gradients(
    dy_MO: Tensor, s_MR: Tensor, lora_B: Tensor, scaling: float, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the update with respect to s, (M, R), and B, (O, R), as far as ``needs`` says."""
    ds_MR, d_B = grad_S_and_B(dy_MO, s_MR, lora_B, scaling)
    return ds_MR if needs[0] else None, d_B.contiguous() if needs[1] else None


def input_gradients(
    ds_MR: Tensor, x_MI: Tensor, lora_A: Tensor, p: float, seed: Tensor | None, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the update with respect to x, (M, I), and A, (R, I), as far as ``needs`` says."""
    dx = expand(ds_MR, lora_A, None, p, seed) if needs[0] else None
    return dx, grad_A(ds_MR, x_MI, p, seed) if needs[1] else None
