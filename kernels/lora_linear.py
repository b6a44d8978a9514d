"""The fused op: ``y = x W^T + b + scaling * (drop(x) A^T) B^T``; W and b are frozen.

Shape suffixes: M = tokens, I = d_in, O = d_out, R = rank.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dynrank.kernels.backends import Backend, products_of

Weight = Tensor | Callable[[], Tensor]


def lora_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """``x W^T + b + scaling * (drop(x) A^T) B^T`` with W and b frozen (Hu et al., arXiv:2106.09685, section 4.1).

    The op saves x and drop(x) A^T for backward. Under autocast it computes in autocast's dtype, as a linear layer does.

    Args:
        x: (..., I), any dtype that torch can multiply.
        weight: (O, I) in x's dtype; no gradient. Or a function that unpacks and returns it in any dtype. The op calls
            the function once in forward, and once in backward if x needs a gradient, and does not keep the result
            (QLoRA, arXiv:2305.14314, section 3).
        bias: (O,) or None; no gradient.
        lora_A: (R, I), any dtype. If it is wider than x's, the gradients of A and B are summed in it.
        lora_B: (O, R), the dtype of lora_A.
        scaling: factor of the update.
        dropout: probability of zeroing an element of the update's input, in [0, 1].
        seed: seed of the dropout mask, 0-d int64; None draws a new one by :func:`draw_seed`.
        backend: which backend makes the products with A and B, see :func:`dynrank.kernels.backends.products_of`.

    Returns:
        (..., O) in the dtype of x, or in autocast's dtype under autocast.

    Raises:
        ValueError: if a shape or x's dtype does not fit, or ``dropout`` is no probability.
        ConfigurationError: if the backend does not support x or the rank.
    """
    _check_shapes(x, weight, bias, lora_A, lora_B)
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be in [0, 1], got {dropout}")
    x, bias, lora_A, lora_B = _in_working_dtypes(x, weight, bias, lora_A, lora_B)
    products = products_of(backend, x, lora_A.shape[0])
    if not dropout:
        seed = None
    elif seed is None:
        seed = draw_seed(products.seed_place(x))
    constants = _Constants(weight, bias, scaling, dropout, seed, products)
    if torch.is_grad_enabled():
        y: Tensor = _Node.apply(x, lora_A, lora_B, constants)  # type: ignore[no-untyped-call]
        return y
    return _forward(x, lora_A, lora_B, constants)[0]


def add_update(y: Tensor, update: Tensor, scaling: float) -> Tensor:
    """``y + scaling * update`` in the dtype of y, in as few operations of torch as it takes.

    Args:
        y: (..., O), the output of the frozen layer.
        update: (..., O), ``(drop(x) A^T) B^T`` in the dtype of the factors.
        scaling: factor of the update.
    """
    total = torch.add(y, update, alpha=scaling)
    return total if total.dtype == y.dtype else total.to(y.dtype)


def draw_seed(device: torch.device) -> Tensor:
    """A seed from the device's default generator, 0-d int64; restoring the generator's state repeats it."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


class _Constants(NamedTuple):
    """What needs no gradient, and the module that makes the products; no seed means no dropout."""

    weight: Weight
    bias: Tensor | None
    scaling: float
    p: float
    seed: Tensor | None
    products: ModuleType


def _forward(x: Tensor, lora_A: Tensor, lora_B: Tensor, given: _Constants) -> tuple[Tensor, Tensor]:
    """The output, and ``s = drop(x) A^T``."""
    products = given.products
    x_MI = _rows(x)
    s_MR = products.shrink(x_MI, lora_A, products.dropout(x_MI, given.p, given.seed))
    y_MO = products.expand(s_MR, lora_B.mT, given.scaling, given.bias, products.NO_DROPOUT, x.dtype)
    y_MO.addmm_(x_MI, _unpacked(given.weight, x.dtype).mT)
    if x.ndim != 2:
        # Of a view that a Function returns, torch forbids in-place changes.
        y_MO.resize_(*x.shape[:-1], lora_B.shape[0])
    return y_MO, s_MR


class _Node(torch.autograd.Function):
    """The node of the autograd graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, given: _Constants) -> Tensor:
        y, s_MR = _forward(x, lora_A, lora_B, given)
        weight = given.weight if isinstance(given.weight, Tensor) else None
        ctx.save_for_backward(x, s_MR, lora_A, lora_B, weight, given.seed)
        ctx.given = given
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """``dB = scaling * dy^T s``, ``ds = scaling * dy B``, ``dA = ds^T drop(x)`` and ``dx = drop(ds A) + dy W``."""
        # This access lets torch check that no saved tensor, W and the seed included, was changed in place.
        x, s_MR, lora_A, lora_B, *_ = ctx.saved_tensors
        need_x, need_A, need_B, _ = ctx.needs_input_grad
        given: _Constants = ctx.given
        if torch.is_grad_enabled():
            # With create_graph. The saved s is a constant, and a second derivative has to know what it depends on.
            return _recorded_gradients((x, lora_A, lora_B), dy, given, ctx.needs_input_grad)
        products = given.products
        x_MI = _rows(x)
        dy_MO = _rows(dy)
        ds_MR, d_B = products.grad_S_and_B(dy_MO, s_MR, lora_B, given.scaling, (need_x or need_A, need_B))
        d_A = None
        dx = None
        if need_x or need_A:
            dropout = products.dropout(x_MI, given.p, given.seed)
        if need_A:
            d_A = products.grad_A(ds_MR, x_MI, lora_A.dtype, dropout)
        if need_x:
            dx = products.expand(ds_MR, lora_A, 1.0, None, dropout, x.dtype)
            dx = dx.addmm_(dy_MO, _unpacked(given.weight, x.dtype)).view(x.shape)
        return dx, d_A, d_B, None


def _recorded_gradients(
    operands: tuple[Tensor, Tensor, Tensor], dy: Tensor, given: _Constants, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of x, A and B by operations that autograd records, so that they can be differentiated again."""
    x, lora_A, lora_B = operands
    products = given.products
    x_MI = _rows(x)
    # 1 where dropout keeps an element: the backend's own mask, drawn over a bias of ones.
    zeros_MR = x_MI.new_zeros(len(x_MI), len(lora_A))
    ones_I = x_MI.new_ones(x_MI.shape[1])
    dropout = products.dropout(x_MI, given.p, given.seed)
    kept_MI = products.expand(zeros_MR, lora_A.detach(), 1.0, ones_I, dropout, x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        dropped = (x_MI * kept_MI).to(lora_A.dtype) * dropout.rescale
        update = F.linear(F.linear(dropped, lora_A), lora_B) * given.scaling
        y = F.linear(x_MI, _unpacked(given.weight, x.dtype)) + update
        wanted = [operand for operand, needed in zip(operands, needs, strict=False) if needed]
        found = iter(torch.autograd.grad(y.to(x.dtype), wanted, _rows(dy), create_graph=True))
    return (*(next(found) if needed else None for needed in needs),)


def _check_shapes(x: Tensor, weight: Weight, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor) -> None:
    """Refuse shapes that do not fit, since the kernels do not check them."""
    rank = lora_A.shape[0]
    d_out, d_in = weight.shape if isinstance(weight, Tensor) else (lora_B.shape[0], lora_A.shape[1])
    factors_fit = lora_A.shape == (rank, d_in) and lora_B.shape == (d_out, rank)
    if not factors_fit or x.shape[-1:] != (d_in,) or (bias is not None and bias.shape != (d_out,)):
        given = {"x": x, "lora_A": lora_A, "lora_B": lora_B, "bias": bias}
        shapes = {name: tuple(tensor.shape) for name, tensor in given.items() if tensor is not None}
        raise ValueError(
            f"shapes must be x (..., {d_in}), lora_A (rank, {d_in}), lora_B ({d_out}, rank) and bias ({d_out},) for a "
            f"weight of {(d_out, d_in)}, got {shapes}"
        )


def _in_working_dtypes(
    x: Tensor, weight: Weight, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The operands in x's dtype, or under autocast in autocast's; outside autocast, wider factors stay wider."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    if autocast:
        x = x.to(torch.get_autocast_dtype(device))
    elif isinstance(weight, Tensor) and weight.dtype != x.dtype:
        raise ValueError(f"x must have the dtype of the weight, {weight.dtype}, got {x.dtype}")
    # A check takes less time than a call of torch that changes nothing.
    wide = x.dtype if autocast else torch.promote_types(x.dtype, lora_A.dtype)
    if not lora_A.dtype == lora_B.dtype == wide:
        lora_A = lora_A.to(wide)
        lora_B = lora_B.to(wide)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    return x, bias, lora_A, lora_B


def _unpacked(weight: Weight, dtype: torch.dtype) -> Tensor:
    weight = weight if isinstance(weight, Tensor) else weight()
    return weight if weight.dtype == dtype else weight.to(dtype)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
