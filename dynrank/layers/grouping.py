"""Groups of LoRA layers that one module calls on the same x, such as q, k and v: they share one pass over x."""

import threading
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dynrank.kernels.lora_linear import SharedInput
from dynrank.kernels.triton_launch import unsupported
from dynrank.layers.kinds import LoRAConv1D, LoRALinear
from dynrank.private import saved_tensor_hooks

# Names of layers in one parent that models call on the same x.
SETS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)


def group_layers(model: nn.Module, always: bool) -> None:
    """Let linear layers of ``model`` share a pass over x if they have the names of one of ``SETS`` in one parent.

    The first layer that the parent's forward calls on an x opens a pass for all layers of its group. Layers that are
    called on the same, unchanged tensor take their output from this pass; another x opens another pass. No state
    remains after that forward, so a resumed run computes the same as an uninterrupted one.

    A layer computes alone outside of its parent's forward, or in a part of it that is checkpointed separately; under
    torch.compile, whose tensors have no version; in plain inference, where sharing saves nothing; if a tensor is of a
    subclass (sharded, packed, fake); and if Triton supports its rank but not the sum of the ranks.

    Unless ``always``, layers share only on a GPU and where there is dropout, because elsewhere it is not faster. If
    neither is possible they get no hooks, which would cost 4% of the host time of three layers.

    The layers share a node of the autograd graph. So separate backward passes through the outputs of two layers need
    ``retain_graph=True``. The parameters must not change while the parent's forward runs.
    """
    for parent in model.modules():
        for names in SETS:
            children: list[Any] = [parent._modules.get(name) for name in names]
            layers = [child for child in children if type(child) in (LoRALinear, LoRAConv1D)]
            pays = always or torch.cuda.is_available() or any(layer.dropout.p for layer in layers)
            if len(layers) > 1 and pays:
                for layer in layers:
                    layer.shared_output = partial(_shared_output, names, always)
                if _enter not in parent._forward_pre_hooks.values():
                    parent.register_forward_pre_hook(_enter)
                    parent.register_forward_hook(_leave, always_call=True)


class _Pass:
    """A pass over x, and the layers that have not taken their output yet."""

    def __init__(self, x: Tensor, layers: list[LoRALinear]) -> None:
        self._x, self._state, self._waiting, self._layers = x, _state(x), [*layers], layers
        operands, p, backend = [layer.operands() for layer in layers], layers[0].drop_rate, layers[0].backend
        self._shared = SharedInput(x, operands, p, backend=backend)

    def has(self, layer: LoRALinear, x: Tensor) -> bool:
        return self._x is x and self._state == _state(x) and layer in self._waiting

    def take(self, layer: LoRALinear) -> Tensor:
        self._waiting.remove(layer)
        return self._shared.output(self._layers.index(layer))


class _Within(threading.local):
    """The module whose forward this thread runs, the context in which it began, and the open pass."""

    parent: nn.Module | None = None
    context: tuple[Any, ...] = ()
    open_pass: _Pass | None = None


_within = _Within()


def _enter(parent: nn.Module, _: Any) -> None:
    if not torch.compiler.is_compiling():
        _within.parent, _within.context, _within.open_pass = parent, _context(), None


def _leave(*_: Any) -> None:
    if not torch.compiler.is_compiling():
        _within.parent = _within.open_pass = None


def _shared_output(names: tuple[str, ...], always: bool, layer: LoRALinear, x: Tensor) -> Tensor | None:
    """The output of ``layer`` from a pass that it shares with its siblings; None if it must compute alone."""
    if not (always or x.is_cuda or layer.drop_rate):
        return None
    if torch.compiler.is_compiling() or _within.parent is None or _within.context != _context():
        return None
    if not (layer.training or torch.is_grad_enabled()) or type(x) not in _PLAIN or x.is_inference():
        return None
    if _within.open_pass is None or not _within.open_pass.has(layer, x):
        _within.open_pass = None
        children, kind = _within.parent._modules, _kind(layer)
        layers: list[Any] = [children[name] for name in names if kind is not None and _kind(children.get(name)) == kind]
        if len(layers) < 2 or layer not in layers:
            return None
        if layer.backend == "triton" and unsupported(x, sum(member.rank for member in layers)):
            return None
        _within.open_pass = _Pass(x, layers)
    return _within.open_pass.take(layer)


_PLAIN = (Tensor, nn.Parameter)


def _kind(layer: nn.Module | None) -> tuple[Any, ...] | None:
    """The properties that layers must have in common to share a pass; None for a layer that cannot share."""
    if not isinstance(layer, LoRALinear):
        return None
    tensors = layer.weight, layer.lora_A, layer.lora_B
    if any(type(tensor) not in _PLAIN or tensor.is_inference() for tensor in tensors):
        return None
    alike = (layer.lora_A.shape[1], layer.drop_rate, layer.backend, isinstance(layer, LoRAConv1D))
    return *((tensor.dtype, tensor.device, tensor.requires_grad) for tensor in tensors), *alike


def _state(x: Tensor) -> tuple[Any, ...]:
    """The properties of x and autocast that must not change between the layers' calls."""
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return x._version, x.requires_grad, autocast


def _context() -> tuple[Any, ...]:
    """The state that differs in a separately checkpointed part, which runs again outside of its parent's forward."""
    return torch.is_grad_enabled(), saved_tensor_hooks()
