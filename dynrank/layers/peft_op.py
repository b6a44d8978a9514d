"""PEFT's LoRA layers with the fused op: subclasses with the same names, state and methods, and another forward.

Each call decides. With one plain adapter it is the op, or where the op does not apply or not pay, the same modules in
fewer operations than PEFT's; else it is PEFT's own forward. All is read from PEFT's layer at that moment, so adapters
that are added, merged or switched off count at once. Only :func:`dynrank.layers.peft_kernel.apply_lora_kernel` and
pickles import this module, and with it PEFT.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.lora import layer as theirs
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dynrank.kernels.backends import experts_pay, may_pay, op_pays
from dynrank.kernels.lora_linear import add_update, lora_linear
from dynrank.layers.experts import ExpertStack, StackLayer, expert_stacks, experts_forward, grouped_lora
from dynrank.private import is_recorded, need_own_call


class Parts(NamedTuple):
    """What the op computes with in a layer with one plain adapter."""

    base: Any
    weight: Any
    lora_A: Tensor
    lora_B: Tensor
    # The probability of dropout at present.
    p: float

    @property
    def is_frozen(self) -> bool:
        """Whether the base has a plain weight and nothing of it is trained; the op computes no gradients for it."""
        trained = any(parameter.requires_grad for parameter in self.base.parameters(recurse=False))
        return isinstance(self.weight, nn.Parameter) and not trained


class Linear(theirs.Linear):
    """PEFT's layer around a linear layer of torch, or transformers' Conv1D."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = None if args or kwargs or is_recorded() else only_adapter(self)
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        parts = plain_parts(self, adapter, x, nn.Linear, Conv1D) if may_pay(x) else None
        if parts is not None and (x.dtype == parts.weight.dtype or is_autocast(x)):
            base, weight, lora_A, lora_B, p = parts
            if op_pays(x, len(lora_B), weight.dtype, p > 0) and parts.is_frozen:
                weight = weight if type(base) is nn.Linear else weight.mT
                return lora_linear(x, weight, base.bias, lora_A, lora_B, self.scaling[adapter], p)
        return self._plain_forward(x, adapter)

    def _plain_forward(self, x: Tensor, adapter: str) -> Tensor:
        """What PEFT's forward computes with this adapter alone, by the same modules."""
        y: Tensor = self.base_layer(x)
        lora_A = self.lora_A[adapter]
        dtype: Any = lora_A.weight.dtype
        if x.dtype != dtype and self.cast_input_dtype_enabled:
            x = x.to(dtype)
        update = self.lora_B[adapter](lora_A(self.lora_dropout[adapter](x)))
        return add_update(y, update, self.scaling[adapter])


def plain_parts(layer: Any, adapter: str, x: Tensor, *bases: type) -> Parts | None:
    """What the op computes with; None if it would compute something else than the modules do.

    All of them have to be exactly of the classes whose formula is known (``bases`` for the base), and nobody may read
    or add anything between them.
    """
    # An access to a module's part takes as long as the rest of a check, so each part is read once.
    base = layer.base_layer
    lora_A = layer.lora_A[adapter]
    lora_B = layer.lora_B[adapter]
    dropout = layer.lora_dropout[adapter]
    known = type(base) in bases and type(lora_A) is type(lora_B) is nn.Linear
    if x.is_meta or not known or type(dropout) not in (nn.Dropout, nn.Identity):
        return None
    factor = lora_A.weight
    if need_own_call(base, lora_A, lora_B, dropout) or not _is_cast_up(layer, x, factor.dtype):
        return None
    p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
    return Parts(base, base.weight, factor, lora_B.weight, p)


def only_adapter(layer: Any) -> str | None:
    """The adapter that alone decides what ``layer`` adds, without a variant or a bias; None if none does."""
    active = [name for name in layer.active_adapters if name in layer.scaling]
    if len(active) != 1 or layer.disable_adapters or layer.merged:
        return None
    adapter: str = active[0]
    # PEFT's hotswap for compiled models makes scalings tensors.
    plain = not isinstance(layer.scaling[adapter], Tensor) and not layer.lora_bias.get(adapter)
    return adapter if plain and adapter not in layer.lora_variant else None


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
