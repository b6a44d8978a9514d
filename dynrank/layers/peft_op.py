"""PEFT's LoRA layers with the fused op: subclasses with the same names, state and methods, and another forward.

Each call decides. With one plain adapter it is the op, or below the size for which that pays, the same formula in fewer
calls than PEFT's; else PEFT's own forward. All is read from PEFT's layer at that moment, so adapters that are added,
merged or switched off count at once. Only :func:`dynrank.layers.peft_kernel.apply_lora_kernel` and pickles import this
module, and with it PEFT.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.lora import layer as theirs
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dynrank.kernels.backends import experts_pay, op_pays
from dynrank.kernels.lora_linear import add_update, lora_linear
from dynrank.layers.experts import ExpertStack, StackLayer, expert_stacks, experts_forward, grouped_lora
from dynrank.private import is_recorded, need_own_call


class Parts(NamedTuple):
    """What a layer with one plain adapter computes with."""

    base: Any
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    # nn.Dropout or nn.Identity, and its probability at present.
    dropout: nn.Module
    p: float

    @property
    def is_frozen(self) -> bool:
        """Whether the base has a plain weight and nothing of it is trained; the op computes no gradients for it."""
        return isinstance(self.base.weight, nn.Parameter) and not any(
            parameter.requires_grad for parameter in self.base.parameters(recurse=False)
        )


class Linear(theirs.Linear):
    """PEFT's layer around a linear layer of torch, or transformers' Conv1D."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parts = None if args or kwargs else plain_parts(self, x, nn.Linear, Conv1D)
        if parts is None or x.dtype != parts.base.weight.dtype and not is_autocast(x):
            return super().forward(x, *args, **kwargs)
        base, lora_A, lora_B, scaling, dropout, p = parts
        if op_pays(x, len(lora_B), base.weight.dtype, p > 0) and parts.is_frozen:
            weight = base.weight if type(base) is nn.Linear else base.weight.mT
            return lora_linear(x, weight, base.bias, lora_A, lora_B, scaling, p)
        y: Tensor = base(x)
        if x.dtype != lora_A.dtype:
            x = x.to(lora_A.dtype)
        return add_update(y, dropout(x) if p else x, lora_A, lora_B, scaling)


def plain_parts(layer: Any, x: Tensor, *bases: type) -> Parts | None:
    """What ``layer`` computes with; None if PEFT has to compute.

    It has to unless one adapter alone decides, by the plain formula, all parts are exactly of the classes whose formula
    is known (``bases`` for the base), and nobody reads or adds anything between them.
    """
    adapter = None if x.is_meta or is_recorded() else only_adapter(layer)
    if adapter is None:
        return None
    base = layer.base_layer
    lora_A = layer.lora_A[adapter]
    lora_B = layer.lora_B[adapter]
    dropout = layer.lora_dropout[adapter]
    scaling = layer.scaling[adapter]
    known = type(base) in bases and type(lora_A) is type(lora_B) is nn.Linear
    # PEFT's hotswap for compiled models makes scalings tensors.
    if not known or type(dropout) not in (nn.Dropout, nn.Identity) or isinstance(scaling, Tensor):
        return None
    if need_own_call(base, lora_A, lora_B, dropout) or not _is_cast_up(layer, x, lora_A.weight.dtype):
        return None
    p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
    return Parts(base, lora_A.weight, lora_B.weight, scaling, dropout, p)


def only_adapter(layer: Any) -> str | None:
    """The adapter that alone decides what ``layer`` adds, without a variant or a bias; None if none does."""
    active = [name for name in layer.active_adapters if name in layer.scaling]
    if len(active) != 1 or layer.disable_adapters or layer.merged:
        return None
    adapter: str = active[0]
    return None if adapter in layer.lora_variant or layer.lora_bias.get(adapter) else adapter


def is_autocast(x: Tensor) -> bool:
    """Whether products with ``x`` are computed in autocast's dtype."""
    return torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64


def _is_cast_up(layer: Any, x: Tensor, factors: torch.dtype) -> bool:
    """Whether PEFT multiplies by the factors in their dtype, which is that of ``x`` or wider, as the op does."""
    if x.dtype == factors or is_autocast(x):
        return True
    return torch.promote_types(x.dtype, factors) == factors and getattr(layer, "cast_input_dtype_enabled", True)


class ParamWrapper(theirs.ParamWrapper):
    """PEFT's layer around one stacked weight of a module of experts; the outer wrappers hold the inner ones."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        known = len(args) == 2 and not kwargs and not x.is_meta and not is_recorded()
        layers = _stack_layers(self) if known else None
        if layers is None or not experts_pay(x, args[0].numel() / self.num_experts):
            return super().forward(x, *args, **kwargs)
        return experts_forward(self.get_base_layer(), x, args[0], args[1], layers)


def _stack_layers(wrapper: Any) -> dict[str, StackLayer] | None:
    """{stacked weight: what multiplies by it, with the update}; None if PEFT has to compute."""
    owner = wrapper.get_base_layer()
    stacks = expert_stacks(owner)
    if not stacks or any(value.requires_grad for value in owner.parameters()) or need_own_call(owner):
        return None
    layers: dict[str, StackLayer] = {}
    while isinstance(wrapper, theirs.ParamWrapper):
        adapter = only_adapter(wrapper)
        leaf = wrapper.parameter_name
        # The outermost wrapper is being called, and its own hooks run around this call.
        is_called = layers and need_own_call(wrapper)
        if adapter is None or leaf not in stacks or leaf in layers or is_called:
            return None
        layers[leaf] = _stack_layer(wrapper, adapter, stacks[leaf])
        wrapper = wrapper.base_layer
    return layers


def _stack_layer(wrapper: Any, adapter: str, stack: ExpertStack) -> StackLayer:
    """What multiplies rows that are sorted by expert by ``stack``, with the update of this adapter."""
    lora_A = wrapper.lora_A[adapter].weight
    lora_B = wrapper.lora_B[adapter].weight

    def multiply(x_SI: Tensor, ends: Tensor) -> Tensor:
        x_SI = x_SI.to(stack.weight.dtype)
        return grouped_lora(x_SI, x_SI, stack.weight_EIO, lora_A, lora_B, wrapper.scaling[adapter], ends)

    return multiply
