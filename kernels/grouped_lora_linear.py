"""The fused layers that read one x (q, k, v; gate, up): one pass over x for all low-rank updates, one buffer for dx.

Shape suffixes: M = tokens, I = d_in, O = d_out (of one layer), R = rank (of one layer, or of all together).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynrank.kernels.backends import chosen_backend, products_of
from dynrank.kernels.lora_linear import Tap, check_operands, in_working_dtypes, report

__all__ = ["Member", "SharedInput"]


@dataclass(frozen=True)
class Member:
    """What one layer brings; see :func:`dynrank.kernels.lora_linear.lora_linear`. Ranks and d_out may differ."""

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: float


class SharedInput:
    """``y_i = x W_i^T + b_i + scaling_i * (drop(x) A_i^T) B_i^T`` for layers i that are called one by one.

    ``drop(x) [A_1; A_2; ...]^T`` is one product, made here. The frozen products are made when :meth:`output` asks for
    one of them, so that a layer which is never called costs its share of a rank-sized product only. In backward, when
    the gradients of all outputs that were asked for have arrived, dA is one product, and dx one buffer, to which each
    frozen product is added in place (GEMM with beta = 1). x is saved once.

    The outputs have one node in the autograd graph: a second backward through another of them needs
    ``retain_graph=True``. It is of torch's eager mode only: a graph that is being compiled takes ``lora_linear``.

    Args:
        x: (..., I).
        members: weights of one dtype, and factors of one dtype.
        dropout: probability of zeroing an element of the updates' input; there is one mask for all members.
        seed: of the mask.
        backend: as for ``lora_linear``; chosen by the ranks' sum.

    Raises:
        ValueError: as ``lora_linear`` does, or if the members' dtypes differ.
    """

    def __init__(
        self,
        x: Tensor,
        members: Sequence[Member],
        dropout: float = 0.0,
        seed: Tensor | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        dtypes = {(member.weight.dtype, member.lora_A.dtype) for member in members}
        if len(dtypes) != 1:
            raise ValueError(f"members must have weights of one dtype, and factors of one dtype, got {dtypes or None}")
        self._batch, p = x.shape[:-1], float(dropout)
        self._members = []
        backend = chosen_backend(backend, x, sum(len(member.lora_A) for member in members), p)
        for member in members:
            given = member.bias, member.lora_A, member.lora_B
            check_operands(x, tuple(member.weight.shape), *given, dropout, seed)
            # x is cast for the first of them, and has the dtype then
            x, bias, lora_A, lora_B, _ = in_working_dtypes(x, member.weight.dtype, *given, p, backend)
            self._members.append(Member(member.weight, bias, lora_A, lora_B, member.scaling))
        self._products = products_of(backend)
        self._x_MI = x.reshape(-1, x.shape[-1])
        self._usage = _Usage()
        parts = ([getattr(m, part) for m in self._members] for part in ("weight", "lora_A", "lora_B"))
        scalings = [member.scaling for member in members]
        options = (p, seed if p else None, scalings, self._products, self._usage)
        *self._handles, self._s_MR = _SharedInput.apply(self._x_MI, options, *(each for part in parts for each in part))  # type: ignore[no-untyped-call]
        self._ends = [*accumulate(len(member.lora_A) for member in self._members)]

    @property
    def spent(self) -> bool:
        """Whether a backward pass has gone through it, which an output asked for now would come too late for."""
        return self._usage.spent

    def output(self, index: int, tap: Tap | None = None) -> Tensor:
        """The output of a member, (..., O), to be asked for once; ``tap`` as in ``lora_linear``."""
        member, end = self._members[index], self._ends[index]
        s_MR = self._s_MR[:, end - len(member.lora_A) : end]
        handle, own = self._handles[index], (self._x_MI, member.lora_A, member.lora_B)
        if not any(tensor.requires_grad for tensor in own):
            handle = handle.detach()
        y_MO = _Output.apply(handle, self._x_MI.detach(), s_MR, member, self._products)  # type: ignore[no-untyped-call]
        report(tap, y_MO, s_MR, member.lora_B, member.scaling)
        result: Tensor = y_MO if len(self._batch) == 1 else y_MO.view(*self._batch, y_MO.shape[-1])
        return result


@dataclass
class _Usage:
    spent: bool = False


class _SharedInput(torch.autograd.Function):
    """For each member a tensor without memory that stands for y_i and takes dy_i; then drop(x) A^T."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MI: Tensor,
        options: tuple[float, Tensor | None, list[float], ModuleType, _Usage],
        *operands: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.p, seed, ctx.scalings, ctx.products, ctx.usage = options
        weights, lora_As, _ = _thirds(operands)
        s_MR = ctx.products.down(x_MI, torch.cat(lora_As), ctx.p, seed)
        ctx.mark_non_differentiable(s_MR)
        ctx.set_materialize_grads(False)  # no zeros for an output that is not used
        ctx.save_for_backward(x_MI, s_MR, seed, *operands)
        return *(x_MI.new_zeros(()).expand(len(x_MI), len(weight)) for weight in weights), s_MR

    @staticmethod
    @once_differentiable  # drop(x) A^T is kept as a number, not as a function of x
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.usage.spent = True
        x_MI, s_MR, seed, *operands = ctx.saved_tensors
        count = len(ctx.scalings)
        weights, lora_As, lora_Bs = _thirds(operands)
        need_x, (_, need_As, need_Bs) = ctx.needs_input_grad[0], _thirds(ctx.needs_input_grad[2:])
        parts = s_MR.split([len(lora_A) for lora_A in lora_As], dim=1)
        d_As: list[Tensor | None] = [None] * count
        d_Bs: list[Tensor | None] = [None] * count
        through, ds = [], []
        for i, dy_MO in enumerate(grads[:count]):
            if dy_MO is not None:
                needs = (need_x or need_As[i], need_Bs[i])
                ds_MR, d_Bs[i] = ctx.products.output_gradients(dy_MO, parts[i], lora_Bs[i], ctx.scalings[i], needs)
                if ds_MR is not None:
                    through.append(i)
                    ds.append(ds_MR)
        if not through:
            return None, None, *([None] * 2 * count), *d_Bs
        lora_A, needs = torch.cat([lora_As[i] for i in through]), (need_x, any(need_As[i] for i in through))
        dx, d_A = ctx.products.input_gradients(torch.cat(ds, dim=1), x_MI, lora_A, ctx.p, seed, needs)
        if d_A is not None:
            pieces = d_A.split([len(lora_As[i]) for i in through])
            for i, piece in zip(through, pieces, strict=True):
                d_As[i] = piece.clone()  # not a view that keeps the others' memory
        if dx is not None:
            for i in through:
                dx.addmm_(grads[i], weights[i].to(dx.dtype))
        return dx, None, *([None] * count), *d_As, *d_Bs


class _Output(torch.autograd.Function):
    """y of one member; its gradient goes to the handle."""

    @staticmethod
    def forward(ctx: Any, handle: Tensor, x_MI: Tensor, s_MR: Tensor, member: Member, products: ModuleType) -> Tensor:
        y_MO: Tensor = products.up(s_MR, member.lora_B, member.scaling, member.bias, x_MI.dtype)
        return y_MO.addmm_(x_MI, member.weight.to(x_MI.dtype).mT)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None, None, None


def _thirds(operands: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    count = len(operands) // 3
    return [*operands[:count]], [*operands[count : 2 * count]], [*operands[2 * count :]]
