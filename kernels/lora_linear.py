"""The fused op: ``y = x W^T + b + scaling * (drop(x) A^T) B^T`` for each layer that reads one x; W and b are frozen.

Shape suffixes: M = tokens, I = d_in, O = d_out, R = rank (of one layer, or of all together).
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynrank.kernels.backends import products_of
from dynrank.kernels.dropout import draw_seed

Tap = Callable[[Tensor, Tensor], None]


class Operands(NamedTuple):
    """The operands of one layer, as in :func:`lora_linear`."""

    weight: Tensor | Callable[[], Tensor]
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    tap: Tap | None = None


def lora_linear(
    x: Tensor,
    weight: Tensor | Callable[[], Tensor],
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
        seed: seed of the dropout mask, 0-d int64, see :func:`dynrank.kernels.dropout.draw_seed`; None draws a new one.
        backend: which backend makes the products with A and B, see :func:`dynrank.kernels.backends.products_of`.
        tap: an observer. Each backward calls it with ``z = drop(x) A^T`` and the gradient of the loss at z, both
            (..., R) where x is (..., I), and both without a graph.

    Returns:
        (..., O) in the dtype of x, or in autocast's dtype under autocast.

    Raises:
        ValueError: if a shape or x's dtype does not fit, or ``dropout`` is no probability.
        ConfigurationError: if the backend does not support x or the rank.
    """
    layer = Operands(weight, bias, lora_A, lora_B, scaling, tap)
    _check(x, layer, dropout)
    return SharedInput(x, (layer,), dropout, seed, backend=backend).output(0)


class SharedInput:
    """One pass over x for all layers that read it; the constructor computes ``s = drop(x) [A_1; A_2; ...]^T``.

    :meth:`output` computes the output of one layer. So a layer that then reads another tensor has cost only its part of
    s. Backward runs when the gradients of all outputs in use have arrived: dA is one product, and each frozen product
    is added in place to one buffer for dx. x is saved once.

    The outputs share a node of the autograd graph, so a second backward through another output needs
    ``retain_graph=True``. The shapes must fit; unlike :func:`lora_linear`, this class does not check them.

    The arguments are as in :func:`lora_linear`. The layers' factors have one dtype, and all need gradients or none
    does; ranks and d_out may differ. All layers share one dropout mask. The backend must support the sum of the ranks.
    """

    def __init__(
        self,
        x: Tensor,
        layers: Sequence[Operands],
        dropout: float = 0.0,
        seed: Tensor | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        x, layers = _in_working_dtypes(x, layers)
        products = products_of(backend, x, sum([layer.lora_A.shape[0] for layer in layers]))
        if not dropout:
            seed = None
        elif seed is None:
            seed = draw_seed(products.seed_place(x))
        self._x, self._layers, self._how = x, layers, ProductOptions(dropout, seed, products)
        if torch.is_grad_enabled():
            factors = [factor for layer in layers for factor in (layer.lora_A, layer.lora_B)]
            self._ys = _Node.apply(self, x, *factors)  # type: ignore[no-untyped-call]
        else:
            self.s_MR, self._ys = _open(x, layers, self._how)

    def output(self, index: int) -> Tensor:
        """The output of layer ``index``, (..., O); call this once per layer."""
        y: Tensor = self._ys[index]
        if len(self._layers) > 1:
            with torch.no_grad():
                s_MR = _split(self.s_MR, self._layers, 1)[index]
                _up(y, _rows(self._x), s_MR, self._layers[index], self._how)
        return y


class ProductOptions(NamedTuple):
    """How the products with A and B are made."""

    # The probability of dropout.
    p: float
    # The seed of the mask; None means no dropout.
    seed: Tensor | None
    # The module that makes the products: torch_backend or triton_launch.
    products: ModuleType


def _open(x: Tensor, layers: Sequence[Operands], how: ProductOptions) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``s = drop(x) [A_1; A_2; ...]^T`` and the outputs: computed for a single layer, empty tensors for several."""
    x_MI, lora_A = _rows(x), _joined([layer.lora_A for layer in layers], 0)
    s_MR = how.products.shrink(x_MI, lora_A, how.products.dropout(x_MI, how.p, how.seed))
    ys = tuple([x.new_empty(*x.shape[:-1], layer.lora_B.shape[0]) for layer in layers])
    if len(ys) == 1:
        _up(ys[0], x_MI, s_MR, layers[0], how)
    return s_MR, ys


def _up(y: Tensor, x_MI: Tensor, s_MR: Tensor, layer: Operands, how: ProductOptions) -> None:
    """Write ``scaling * s B^T + b + x W^T`` into ``y``."""
    y_MO, products = _rows(y), how.products
    products.expand(s_MR, layer.lora_B.mT, layer.scaling, layer.bias, products.NO_DROPOUT, y.dtype, out=y_MO)
    y_MO.addmm_(x_MI, _weight(layer, x_MI.dtype).mT)


def _gradients(
    x_MI: Tensor, uses: Sequence[tuple[Tensor, Tensor, Operands]], how: ProductOptions, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
    """The gradients of x and of (A, B) of each layer; ``needs`` says which of x, A and B need one.

    ``dB = scaling * dy^T s``, ``ds = scaling * dy B``, ``dA = ds^T drop(x)``, and the sum of ``dx = drop(ds A) + dy W``
    over the layers. ``uses`` has (dy, s, operands) of each layer, dy as (M, O).
    """
    need_x, need_A, need_B = needs
    products, layers = how.products, [layer for *_, layer in uses]
    ds, d_Bs, dx = [], [], None
    d_As: list[Tensor | None] = [None] * len(uses)
    for dy_MO, s_MR, layer in uses:
        wanted = need_x or need_A or layer.tap is not None, need_B
        ds_MR, d_B = products.grad_S_and_B(dy_MO, s_MR, layer.lora_B, layer.scaling, wanted)
        if layer.tap is not None:
            layer.tap(s_MR, ds_MR)
        ds.append(ds_MR)
        d_Bs.append(d_B)
    if need_x or need_A:
        ds_MR, dropout = _joined(ds, 1), products.dropout(x_MI, how.p, how.seed)
        if need_A:
            d_A = products.grad_A(ds_MR, x_MI, layers[0].lora_A.dtype, dropout)
            # A view would keep the memory of the other layers' gradients alive.
            d_As = [d_A] if len(layers) == 1 else [part.clone() for part in _split(d_A, layers, 0)]
        if need_x:
            dx = products.expand(ds_MR, _joined([layer.lora_A for layer in layers], 0), 1.0, None, dropout, x_MI.dtype)
            for dy_MO, _, layer in uses:
                dx.addmm_(dy_MO, _weight(layer, dx.dtype))
    return dx, list(zip(d_As, d_Bs, strict=True))


class _Node(torch.autograd.Function):
    """The node of the autograd graph for the outputs of a :class:`SharedInput`."""

    @staticmethod
    def forward(ctx: Any, shared: SharedInput, x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        layers, how = shared._layers, shared._how
        shared.s_MR, ys = _open(x, layers, how)
        # The gradient of an output that the loss does not use is then None and not a tensor of zeros.
        ctx.set_materialize_grads(False)
        weights = [layer.weight for layer in layers if isinstance(layer.weight, Tensor)]
        ctx.save_for_backward(x, shared.s_MR, how.seed, *factors, *weights)
        ctx.layers, ctx.how = layers, how
        return ys

    @staticmethod
    # s is saved as a constant and not as a function of x, so a second derivative would be wrong.
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        # This access lets torch check that no saved tensor, the factors included, was changed in place.
        x, s_MR, *_ = ctx.saved_tensors
        parts = zip(dys, _split(s_MR, ctx.layers, 1), ctx.layers, strict=True)
        uses = [(_rows(dy), s, layer) for dy, s, layer in parts if dy is not None]
        if not uses:
            return (None,) * len(ctx.needs_input_grad)
        # All layers' factors need gradients, or none does, so those of the first layer decide.
        _, need_x, need_A, need_B, *_ = ctx.needs_input_grad
        dx, pairs = _gradients(_rows(x), uses, ctx.how, (need_x, need_A, need_B))
        given = iter(pairs)
        factors = [grad for dy in dys for grad in ((None, None) if dy is None else next(given))]
        return None, None if dx is None else dx.view(x.shape), *factors


def _check(x: Tensor, layer: Operands, p: float) -> None:
    """Refuse shapes that do not fit, since the kernels do not check them, and a dropout that is no probability."""
    weight, bias, lora_A, lora_B, *_ = layer
    d_out, d_in = weight.shape if isinstance(weight, Tensor) else (lora_B.shape[0], lora_A.shape[1])
    rank = lora_A.shape[0]
    wanted = {"x": (*x.shape[:-1], d_in), "lora_A": (rank, d_in), "lora_B": (d_out, rank), "bias": (d_out,)}
    for (name, shape), given in zip(wanted.items(), (x, lora_A, lora_B, bias), strict=True):
        if given is not None and given.shape != shape:
            raise ValueError(f"{name} must be {shape} for a weight of {(d_out, d_in)}, got {tuple(given.shape)}")
    if not 0 <= p <= 1:
        raise ValueError(f"dropout must be in [0, 1], got {p}")


def _in_working_dtypes(x: Tensor, layers: Sequence[Operands]) -> tuple[Tensor, Sequence[Operands]]:
    """The operands in x's dtype, or under autocast in autocast's; outside autocast, wider factors stay wider."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    if autocast:
        x = x.to(torch.get_autocast_dtype(device))
    dtype, working = x.dtype, []
    for layer in layers:
        weight, bias, lora_A, lora_B, *_ = layer
        if isinstance(weight, Tensor) and weight.dtype != dtype and not autocast:
            raise ValueError(f"x must have the dtype of the weight, {weight.dtype}, got {dtype}")
        wide = dtype if autocast else torch.promote_types(dtype, lora_A.dtype)
        if lora_A.dtype != wide:
            layer = layer._replace(lora_A=lora_A.to(wide), lora_B=lora_B.to(wide))
        if bias is not None and bias.dtype != dtype:
            layer = layer._replace(bias=bias.to(dtype))
        if layer.tap is not None:
            layer = layer._replace(tap=_shaped(layer.tap, x.shape[:-1]))
        working.append(layer)
    return x, working


def _shaped(tap: Tap, shape: Sequence[int]) -> Tap:
    """A tap that takes (M, R) tensors and calls ``tap`` with them as (*shape, R)."""
    return lambda z_MR, dz_MR: tap(*(t.reshape(*shape, t.shape[-1]) for t in (z_MR, dz_MR)))


def _weight(layer: Operands, dtype: torch.dtype) -> Tensor:
    weight = layer.weight if isinstance(layer.weight, Tensor) else layer.weight()
    return weight if weight.dtype == dtype else weight.to(dtype)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([*parts], dim)


def _split(joined: Tensor, layers: Sequence[Operands], dim: int) -> Sequence[Tensor]:
    """The part of each layer in a tensor that holds the ranks of all layers along ``dim``."""
    return [joined] if len(layers) == 1 else torch.split(joined, [layer.lora_A.shape[0] for layer in layers], dim)
