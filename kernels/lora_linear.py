"""Frozen linear plus low-rank update in one op: ``y = x W^T + b + scaling * (drop(x) A^T) B^T``.

Shape suffixes: M = tokens, I = d_in, O = d_out, R = rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dynrank.kernels.backends import chosen_backend, products_of

__all__ = ["Tap", "lora_linear", "lora_linear_reference"]

Tap = Callable[[Tensor, Tensor], None]


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    keep: Tensor | float = 1.0,
) -> Tensor:
    """The formula, one torch op after the other; what :func:`lora_linear` is tested against.

    ``keep`` is what dropout multiplies x by, in the shape of x.
    """
    y = x @ weight.mT if bias is None else x @ weight.mT + bias
    return y + scaling * ((x * keep) @ lora_A.mT @ lora_B.mT)


def lora_linear(
    x: Tensor,
    weight: Tensor,
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
    """``x W^T + b + scaling * (drop(x) A^T) B^T`` with W and b frozen (Hu et al., arXiv:2106.09685, section 4.1).

    The update is expanded first and the frozen product accumulated into it (GEMM with beta = 1), which saves a
    read and a write of y and, in bfloat16, does not lose a small update to the rounding of a large y. For backward
    x and drop(x) A^T are kept, nothing else: dropout's mask is made again from ``seed``.

    Under autocast all of it is done in autocast's dtype, as torch does a linear layer.

    Args:
        x: (..., I), any dtype that torch multiplies.
        weight: (O, I), the dtype of x; gets no gradient.
        bias: (O,) or None, the dtype of x; gets no gradient.
        lora_A: (R, I), any dtype. Where it is wider than x's, the products with A and the gradients of A and B are made
            in it (by Triton's kernels always in x's dtype, with sums in float32).
        lora_B: (O, R), the dtype of lora_A.
        scaling: factor of the update.
        dropout: probability of zeroing an element of the update's input, in [0, 1].
        seed: of the mask, see :func:`dynrank.kernels.dropout.draw_seed`; needed where ``dropout`` is above 0.
        backend: who makes the products with A and B, see :func:`dynrank.kernels.backends.chosen_backend`.
        tap: called in backward with ``z = drop(x) A^T`` and the gradient at z, both (M, R).

    Returns:
        (..., O), the dtype of x (of autocast, under it).

    Raises:
        ValueError: if a dtype or a shape does not fit, or the seed is missing or no 0-d int64 tensor beside x; as a
            ConfigurationError, if the backend cannot serve x.
    """
    d_out, d_in = weight.shape
    check_operands(x, weight.shape, bias, lora_A, lora_B, dropout, seed)
    x, bias, lora_A, lora_B, backend = in_working_dtypes(x, weight.dtype, bias, lora_A, lora_B, dropout, backend)
    x_MI, p = x.reshape(-1, d_in), float(dropout)
    y_MO, s_MR = _op(x_MI, weight, bias, lora_A, lora_B, scaling, p, seed if p else None, backend)
    report(tap, y_MO, s_MR, lora_B, scaling)
    # reshaped out here: a view that leaves the op could not be changed in place (ReLU(inplace=True))
    result: Tensor = y_MO if x.ndim == 2 else y_MO.view(*x.shape[:-1], d_out)
    return result


def check_operands(
    x: Tensor,
    shape: tuple[int, ...],
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    dropout: float,
    seed: Tensor | None,
) -> None:
    """Refuse what :func:`lora_linear` cannot serve; ``shape`` is the weight's, (O, I).

    Raises:
        ValueError: see :func:`lora_linear`.
    """
    (d_out, d_in), rank = shape, lora_A.shape[0]
    if x.shape[-1:] != (d_in,) or lora_A.shape != (rank, d_in) or lora_B.shape != (d_out, rank):
        raise ValueError(
            f"x must be (..., {d_in}), lora_A (rank, {d_in}) and lora_B ({d_out}, rank) for a weight of "
            f"{[*shape]}, got {[*x.shape]}, {[*lora_A.shape]} and {[*lora_B.shape]}"
        )
    if bias is not None and bias.shape != (d_out,):
        raise ValueError(f"bias must be ({d_out},), got {[*bias.shape]}")
    if lora_A.dtype != lora_B.dtype:
        raise ValueError(f"lora_A and lora_B must have one dtype, got {lora_A.dtype} and {lora_B.dtype}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be in [0, 1], got {dropout}")
    if dropout and (seed is None or seed.dtype != torch.int64 or seed.ndim or seed.device != x.device):
        got = None if seed is None else (seed.dtype, [*seed.shape], str(seed.device))
        raise ValueError(f"dropout needs a seed, a 0-d int64 tensor on {x.device} (draw_seed), got {got}")


def in_working_dtypes(
    x: Tensor,
    weight: torch.dtype,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    dropout: float,
    backend: str,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, str]:
    """(x, bias, lora_A, lora_B) in the dtypes that the products are made in, and the backend that makes them.

    Raises:
        ValueError: if x, weight and bias differ, outside of autocast, or the backend cannot serve x.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        weight = torch.get_autocast_dtype(x.device.type)
        x, lora_A, lora_B = x.to(weight), lora_A.to(weight), lora_B.to(weight)
        bias = None if bias is None else bias.to(weight)
    if x.dtype != weight or (bias is not None and bias.dtype != weight):
        got = f"{x.dtype}, {weight} and {None if bias is None else bias.dtype}"
        raise ValueError(f"x, weight and bias must have one dtype, got {got}")
    backend = chosen_backend(backend, x, lora_A.shape[0], dropout)
    wide = x.dtype if backend == "triton" else torch.promote_types(x.dtype, lora_A.dtype)
    return x, bias, lora_A.to(wide), lora_B.to(wide), backend


def report(tap: Tap | None, y_MO: Tensor, s_MR: Tensor, lora_B: Tensor, scaling: float) -> None:
    """Call ``tap`` with s and the gradient at it when y's gradient arrives."""
    if tap is not None and y_MO.requires_grad:
        s_MR, lora_B = s_MR.detach(), lora_B.detach()
        y_MO.register_hook(lambda dy_MO: tap(s_MR, dy_MO.to(lora_B.dtype) @ (scaling * lora_B)))  # type: ignore[no-untyped-call]


def product(
    x_MI: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``y`` (M, O) and ``drop(x) A^T`` (M, R); a weight of another dtype is cast to x's."""
    products = products_of(backend)
    s_MR = products.down(x_MI, lora_A, p, seed)
    y_MO = products.up(s_MR, lora_B, scaling, bias, x_MI.dtype)
    return y_MO.addmm_(x_MI, weight.to(x_MI.dtype).mT), s_MR


def gradients(
    dy_MO: Tensor,
    x_MI: Tensor,
    s_MR: Tensor,
    weight: Callable[[], Tensor],
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    p: float,
    seed: Tensor | None,
    backend: str,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients with respect to x, A and B, as far as ``needs`` says; ``weight`` is asked for x's alone."""
    need_x, need_A, need_B = needs
    products, dx, d_A = products_of(backend), None, None
    ds_MR, d_B = products.output_gradients(dy_MO, s_MR, lora_B, scaling, (need_x or need_A, need_B))
    if ds_MR is not None:
        dx, d_A = products.input_gradients(ds_MR, x_MI, lora_A, p, seed, (need_x, need_A))
    if dx is not None:
        dx.addmm_(dy_MO, weight().to(dx.dtype))
    return dx, d_A, d_B


@torch.library.custom_op("dynrank::lora_linear", mutates_args=())
def _op(
    x_MI: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return product(x_MI, weight, bias, lora_A, lora_B, scaling, p, seed, backend)


@_op.register_fake
def _(x_MI: Tensor, weight: Tensor, bias: Any, lora_A: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    tokens = x_MI.shape[0]
    return x_MI.new_empty(tokens, weight.shape[0]), lora_A.new_empty(tokens, lora_A.shape[0])


@torch.library.custom_op("dynrank::lora_linear_backward", mutates_args=())
def _backward_op(
    dy_MO: Tensor,
    x_MI: Tensor,
    s_MR: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    p: float,
    seed: Tensor | None,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    need_x, need_A, need_B = needs
    grads = gradients(
        dy_MO, x_MI, s_MR, lambda: weight, lora_A, lora_B, scaling, p, seed, backend, (need_x, need_A, need_B)
    )
    dx, d_A, d_B = (dy_MO.new_empty(0) if grad is None else grad for grad in grads)  # an op's results aren't optional
    return dx, d_A, d_B


@_backward_op.register_fake
def _(
    dy_MO: Tensor, x_MI: Tensor, s_MR: Any, weight: Any, lora_A: Tensor, lora_B: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    operands = zip((x_MI, lora_A, lora_B), rest[-1], strict=True)
    dx, d_A, d_B = (torch.empty_like(operand) if need else dy_MO.new_empty(0) for operand, need in operands)
    return dx, d_A, d_B


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_MI, weight, _, lora_A, lora_B, ctx.scaling, ctx.p, seed, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x_MI, output[1], weight, lora_A, lora_B, seed)


def _backward(ctx: Any, dy_MO: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x_MI, s_MR, weight, lora_A, lora_B, seed = ctx.saved_tensors
    need_x, _, _, need_A, need_B, *_ = ctx.needs_input_grad
    needs = [need_x, need_A, need_B]
    grads = _backward_op(dy_MO, x_MI, s_MR, weight, lora_A, lora_B, ctx.scaling, ctx.p, seed, ctx.backend, needs)
    dx, d_A, d_B = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return dx, None, None, d_A, d_B, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)
