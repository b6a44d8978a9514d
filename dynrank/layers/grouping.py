"""LoRA layers that read the same x, called one after the other: they share one pass over it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dynrank.kernels.backends import chosen_backend
from dynrank.kernels.dropout import draw_seed
from dynrank.kernels.grouped_lora_linear import Member, SharedInput
from dynrank.kernels.lora_linear import Tap
from dynrank.kernels.triton_launch import serves

__all__ = ["Group", "GroupedLayer", "group_layers", "shared_output"]

SETS = (  # names, within one parent, of layers that models call on one x
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


class GroupedLayer(Protocol):
    """What grouping needs of a linear LoRA layer."""

    training: bool
    backend: str
    scaling: float
    dropout: nn.Dropout
    _group: Group | None
    _tap: Tap | None

    @property
    def lora_A(self) -> nn.Parameter: ...

    @property
    def rank(self) -> int: ...

    @property
    def lora_B(self) -> nn.Parameter: ...

    @property
    def weight(self) -> nn.Parameter: ...

    @property
    def bias(self) -> nn.Parameter | None: ...

    @property
    def merged(self) -> bool: ...

    def _weight_OI(self) -> Tensor: ...


class Group:
    """Which layers may share: children of one module, by their names, so that it follows what is put there.

    A copy of the module has a group of its own; a layer copied without the module is in none.
    """

    def __init__(self, parent: nn.Module | None, names: tuple[str, ...]) -> None:
        self._parent = None if parent is None else weakref.ref(parent)
        self._names = names

    @property
    def parent(self) -> nn.Module | None:
        return None if self._parent is None else self._parent()

    def members(self) -> list[GroupedLayer]:
        """The layers that are in it now."""
        children: dict[str, Any] = {} if self.parent is None else self.parent._modules
        found = [children[name] for name in self._names if name in children]
        return [child for child in found if getattr(child, "_group", None) is self]

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return Group(memo.get(id(self.parent)), self._names)

    def __getstate__(self) -> dict[str, Any]:
        return {"parent": self.parent, "names": self._names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def group_layers(model: nn.Module, kinds: Iterable[type]) -> None:
    """Let the layers of ``model`` that have the names of one of ``SETS`` in one module, and one d_in, share their x.

    Args:
        model: with LoRA layers.
        kinds: the classes of layers that can share, each with its like.
    """
    for parent in model.modules():
        for names in SETS:
            alike: dict[tuple[type, int], list[str]] = {}
            for name in names:
                child: Any = parent._modules.get(name)
                if type(child) in kinds:
                    alike.setdefault((type(child), child.lora_A.shape[1]), []).append(name)
            for found in alike.values():
                if len(found) > 1:
                    group = Group(parent, tuple(found))
                    for name in found:
                        vars(parent._modules[name])["_group"] = group


class _Pending:
    """A pass over x that some members of a group have still to take their part of."""

    def __init__(self, x: Tensor, layers: list[GroupedLayer], backend: str) -> None:
        self._x, self._version, self._context = x, x._version, _context(x)
        self._waiting = {id(layer): (index, layer, _operands(layer)) for index, layer in enumerate(layers)}
        p = _dropout(layers[0])
        members = [Member(m._weight_OI(), m.bias, m.lora_A, m.lora_B, m.scaling) for m in layers]
        seed = draw_seed(x.device) if p else None
        self._shared = SharedInput(x, members, p, seed, backend=backend)

    def taken(self, layer: GroupedLayer, x: Tensor) -> Tensor | None:
        """The layer's output, which is given once; None if x or anything that it was made of is another by now."""
        if self._x is not x or self._version != x._version or self._context != _context(x) or self._shared.spent:
            return None
        index, _, operands = self._waiting.get(id(layer), (0, None, None))
        if operands is None or operands != _operands(layer):
            return None
        del self._waiting[id(layer)]
        return self._shared.output(index, layer._tap)

    @property
    def empty(self) -> bool:
        return not self._waiting


class _Slot(threading.local):
    pending: _Pending | None = None


_slot = _Slot()  # one in each thread: what was not asked for is dropped by the next group's call


def shared_output(layer: GroupedLayer, x: Tensor) -> Tensor | None:
    """The output of ``layer``, from the pass over x that it shares; None if it is to compute alone.

    The first layer of a group that is called on an x opens the pass, for all that could follow; those that are called
    on the very same tensor, unchanged, take their part; any other x opens another pass. Nothing is decided beforehand
    or remembered from one forward to the next, so a run that was resumed does what the whole run does.

    A layer computes alone while a graph is compiled (whose tensors have no version), in plain inference (which has
    nothing to gain), where a tensor is more than a plain one (sharded, packed, fake), and where Triton would serve its
    rank but not the ranks' sum.

    As the layers share a node of the autograd graph, a backward through the output of one and then another through that
    of another needs ``retain_graph=True``. A change of values through ``.data`` between the calls on one x is not seen.
    Layers of a group must not be in parts of the model that reentrant checkpointing recomputes apart.
    """
    group = layer._group
    if group is None or torch.compiler.is_compiling() or not (layer.training or torch.is_grad_enabled()):
        return None
    if type(x) not in _PLAIN or x.is_inference():
        return None
    y = None if _slot.pending is None else _slot.pending.taken(layer, x)
    if y is None:
        _slot.pending = None
        like = _kind(layer)
        layers = [member for member in group.members() if _kind(member) == like]
        if like is None or len(layers) < 2 or not any(member is layer for member in layers):
            return None
        backend = chosen_backend(layer.backend, x, layer.rank, _dropout(layer))
        if backend == "triton" and serves(x, sum(member.rank for member in layers)) is not None:
            return None
        _slot.pending = _Pending(x, layers, backend)
        y = _slot.pending.taken(layer, x)
    assert _slot.pending is not None
    if _slot.pending.empty:
        _slot.pending = None
    return y


_PLAIN = (Tensor, nn.Parameter)


def _kind(layer: GroupedLayer) -> tuple[Any, ...] | None:
    """What layers must have in common to share; None for one that cannot."""
    operands = layer.weight, layer.lora_A, layer.lora_B
    if layer.merged or any(type(operand) not in _PLAIN or operand.is_inference() for operand in operands):
        return None
    weight, lora_A, _ = operands
    return weight.dtype, weight.device, lora_A.dtype, lora_A.shape[1], _dropout(layer), layer.backend


def _dropout(layer: GroupedLayer) -> float:
    return layer.dropout.p if layer.training else 0.0


def _operands(layer: GroupedLayer) -> tuple[Any, ...]:
    """The identity and version of what a pass is made of."""
    tensors = layer.weight, layer.lora_A, layer.lora_B
    needs = (tensor.requires_grad for tensor in tensors)
    return *((id(tensor), tensor._version) for tensor in tensors), *needs, layer.scaling, _dropout(layer)


def _context(x: Tensor) -> tuple[Any, ...]:
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    # The hooks are those of a part that is checkpointed: what it saves must be saved in it.
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return torch.is_grad_enabled(), autocast, x.requires_grad, hooks
