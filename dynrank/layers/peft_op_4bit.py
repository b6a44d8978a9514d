"""PEFT's layer around a weight that bitsandbytes has packed into 4 bits, with the fused op while it trains."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import bnb as theirs
from torch import Tensor

from dynrank.kernels.backends import op_pays
from dynrank.kernels.lora_linear import lora_linear
from dynrank.layers.peft_op import plain_parts
from dynrank.layers.quantized import computes_in, unpacker
from dynrank.private import has_hooks, is_recorded


class Linear4bit(theirs.Linear4bit):
    """The op unpacks the weight for each product; without gradients bitsandbytes' own call needs no unpacking."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parts = None if args or kwargs or is_recorded() or not torch.is_grad_enabled() else plain_parts(self)
        weight = None if parts is None else unpacker(parts.base)
        if parts is None or weight is None:
            return super().forward(x, *args, **kwargs)
        base, lora_A, lora_B, scaling, _, p = parts
        dtype = computes_in(base, x)
        trains_bias = base.bias is not None and base.bias.requires_grad
        if trains_bias or has_hooks(base) or not op_pays(x, len(lora_B), dtype, p > 0):
            return super().forward(x)
        return lora_linear(x.to(dtype), weight, base.bias, lora_A, lora_B, scaling, p).to(x.dtype)
