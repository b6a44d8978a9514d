"""LoRA layers that read the same x, called one after the other by one module: they share one pass over it."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dynrank.kernels.lora_linear import SharedInput
from dynrank.kernels.triton_launch import serves
from dynrank.layers.kinds import LoRAConv1D, LoRALinear
from dynrank.private import saved_tensor_hooks

# The names, within one parent, of layers that models call on one x.
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
    """Let the linear layers of ``model`` that have the names of one of ``SETS`` in one module share their x.

    The first of them that the module's forward calls on an x opens a pass for all that could follow; those that are
    called on the very same tensor, unchanged, take their part of it; any other x opens another pass. Nothing is kept
    when that forward ends, or decided by an earlier one, so a run that was resumed does what the whole run does.

    A layer computes alone outside of its parent's forward, or in a part of it that is checkpointed by itself; while a
    graph is compiled (whose tensors have no version); in plain inference, which has nothing to gain; where a tensor is
    more than a plain one (sharded, packed, fake); and where Triton would serve its rank but not the ranks' sum.

    Unless ``always``, they do so where it pays: on a GPU, and where there is dropout. Where neither can be, they get no
    hooks, which would take 4% of the host's time of three layers.

    As the layers share a node of the autograd graph, a backward through the output of one and then another through that
    of another needs ``retain_graph=True``. Layers must not get other values while their parent's forward runs.
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
    """A pass over x, and which of its outputs have still to be taken."""

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
    """The module whose forward this thread is in, how it was entered, and the pass that is open there."""

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
    """The output of ``layer`` from a pass that it shares with its siblings; None if it is to compute alone."""
    if not (always or x.is_cuda or layer.drop_rate):
        return None
    if torch.compiler.is_compiling() or _within.parent is None or _within.context != _context():
        return None
    if not (layer.training or torch.is_grad_enabled()) or type(x) not in _PLAIN or x.is_inference():
        return None
    if _within.open_pass is None or not _within.open_pass.has(layer, x):
        _within.open_pass = None
        children, like = _within.parent._modules, _kind(layer)
        layers: list[Any] = [children[name] for name in names if like is not None and _kind(children.get(name)) == like]
        if len(layers) < 2 or layer not in layers:
            return None
        if layer.backend == "triton" and serves(x, sum(member.rank for member in layers)) is not None:
            return None
        _within.open_pass = _Pass(x, layers)
    return _within.open_pass.take(layer)


_PLAIN = (Tensor, nn.Parameter)


def _kind(layer: nn.Module | None) -> tuple[Any, ...] | None:
    """What layers must have in common to share; None for one that cannot."""
    if not isinstance(layer, LoRALinear):
        return None
    tensors = layer.weight, layer.lora_A, layer.lora_B
    if any(type(tensor) not in _PLAIN or tensor.is_inference() for tensor in tensors):
        return None
    alike = (layer.lora_A.shape[1], layer.drop_rate, layer.backend, isinstance(layer, LoRAConv1D))
    return *((tensor.dtype, tensor.device, tensor.requires_grad) for tensor in tensors), *alike


def _state(x: Tensor) -> tuple[Any, ...]:
    """What must stay between two calls on one x."""
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return x._version, x.requires_grad, autocast


def _context() -> tuple[Any, ...]:
    """What changes within a part that is checkpointed by itself, and so computed again out of its parent's forward."""
    return torch.is_grad_enabled(), saved_tensor_hooks()
