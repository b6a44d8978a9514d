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
from dynrank.private import has_hooks, is_recorded


class Parts(NamedTuple):
    """What a layer with one plain adapter computes with."""

    base: Any
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    # nn.Dropout or nn.Identity, and its probability at present.
    dropout: nn.Module
    p: float


class Linear(theirs.Linear):
    """PEFT's layer around a linear layer of torch, or transformers' Conv1D."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parts = None if args or kwargs or x.is_meta or is_recorded() else plain_parts(self)
        if parts is None or not _has_dtypes_of_op(self, x, parts):
            return super().forward(x, *args, **kwargs)
        base, lora_A, lora_B, scaling, dropout, p = parts
        if op_pays(x, len(lora_B), base.weight.dtype, p > 0) and (weight := _frozen_weight(base)) is not None:
            return lora_linear(x, weight, base.bias, lora_A, lora_B, scaling, p)
        y: Tensor = base(x)
        if x.dtype != lora_A.dtype:
            x = x.to(lora_A.dtype)
        return add_update(y, dropout(x) if p else x, lora_A, lora_B, scaling)


def plain_parts(layer: Any) -> Parts | None:
    """What ``layer`` computes with if one adapter alone decides, by the plain formula; None if PEFT has to compute."""
    adapter = only_adapter(layer)
    if adapter is None:
        return None
    lora_A = layer.lora_A[adapter]
    lora_B = layer.lora_B[adapter]
    dropout = layer.lora_dropout[adapter]
    scaling = layer.scaling[adapter]
    # PEFT's hotswap for compiled models makes scalings tensors.
    if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear or isinstance(scaling, Tensor):
        return None
    if type(dropout) not in (nn.Dropout, nn.Identity) or any(map(has_hooks, (lora_A, lora_B, dropout))):
        return None
    p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
    return Parts(layer.base_layer, lora_A.weight, lora_B.weight, scaling, dropout, p)


def only_adapter(layer: Any) -> str | None:
    """The adapter that alone decides what ``layer`` adds, without a variant or a bias; None if none does."""
    active = [name for name in layer.active_adapters if name in layer.scaling]
    if len(active) != 1 or layer.disable_adapters or layer.merged:
        return None
    adapter: str = active[0]
    return None if adapter in layer.lora_variant or layer.lora_bias.get(adapter) else adapter


def _has_dtypes_of_op(layer: Any, x: Tensor, parts: Parts) -> bool:
    """Whether PEFT multiplies by the base in the dtype of ``x``, and by the factors in theirs, as the op does."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return True
    factors = parts.lora_A.dtype
    is_cast = getattr(layer, "cast_input_dtype_enabled", True) and torch.promote_types(x.dtype, factors) == factors
    return x.dtype == parts.base.weight.dtype and (x.dtype == factors or bool(is_cast))


def _frozen_weight(base: Any) -> Tensor | None:
    """The (d_out, d_in) weight of ``base``; None if ``base`` trains, has hooks or computes something else."""
    weight = base.weight
    if type(weight) is not nn.Parameter or "forward" in vars(base) or has_hooks(base):
        return None
    if weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return None
    if type(base).forward is nn.Linear.forward:
        return weight
    return weight.mT if type(base).forward is Conv1D.forward else None


class ParamWrapper(theirs.ParamWrapper):
    """PEFT's layer around one stacked weight of a module of experts; the outer wrappers hold the inner ones."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layers = None if len(args) != 2 or kwargs or x.is_meta or is_recorded() else _stack_layers(self)
        if layers is None or not experts_pay(x, args[0].numel() / self.num_experts):
            return super().forward(x, *args, **kwargs)
        return experts_forward(self.get_base_layer(), x, args[0], args[1], layers)


def _stack_layers(wrapper: Any) -> dict[str, StackLayer] | None:
    """{stacked weight: what multiplies by it, with the update}; None if PEFT has to compute."""
    owner = wrapper.get_base_layer()
    stacks = expert_stacks(owner)
    if not stacks or any(value.requires_grad for value in owner.parameters()) or has_hooks(owner):
        return None
    layers: dict[str, StackLayer] = {}
    while isinstance(wrapper, theirs.ParamWrapper):
        adapter = only_adapter(wrapper)
        leaf = wrapper.parameter_name
        # The outermost wrapper is being called, and its own hooks run around this call.
        inner_hooks = layers and has_hooks(wrapper)
        if adapter is None or leaf not in stacks or leaf in layers or inner_hooks:
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
