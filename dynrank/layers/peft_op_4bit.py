"""PEFT's layer around a weight that bitsandbytes has packed into 4 bits, with the fused op while it trains."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import bnb as theirs
from torch import Tensor

from dynrank.kernels.backends import op_pays
from dynrank.kernels.lora_linear import lora_linear
from dynrank.layers.foreign import class_if_imported
from dynrank.layers.peft_op import only_adapter, plain_parts
from dynrank.layers.quantized import computes_in, unpacker
from dynrank.private import is_recorded


class Linear4bit(theirs.Linear4bit):
    """PEFT's layer; the op unpacks the weight for each product."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Without gradients bitsandbytes' own call multiplies by the packed weight without unpacking it.
        tried = torch.is_grad_enabled() and not args and not kwargs and not is_recorded()
        adapter = only_adapter(self) if tried else None
        packed = class_if_imported("bitsandbytes.nn.Linear4bit")
        parts = None if adapter is None else plain_parts(self, adapter, x, packed)
        weight = unpacker(parts.base) if parts is not None and parts.is_frozen else None
        if parts is None or weight is None:
            return super().forward(x, *args, **kwargs)
        base, _, lora_A, lora_B, p = parts
        dtype = computes_in(base, x)
        if not op_pays(x, len(lora_B), dtype, p > 0):
            return super().forward(x)
        return lora_linear(x.to(dtype), weight, base.bias, lora_A, lora_B, self.scaling[adapter], p).to(x.dtype)
