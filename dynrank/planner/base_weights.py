"""Tensors without values for a model on the meta device, packed ones as bitsandbytes packs them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from dynrank.layers.quantized import is_quantized

__all__ = ["without_values"]


def without_values(model: nn.Module, mode: FakeTensorMode) -> None:
    """Put fake CPU tensors in the place of all parameters and buffers, in place: bytes and dtypes, but no memory.

    Weights of bitsandbytes' layers are packed by bitsandbytes itself. Ties between parameters stay.
    """
    if any(is_quantized(module) for module in model.modules()):  # tables made within the mode would have no values
        functional: Any = sys.modules["bitsandbytes.functional"]
        functional.quantize_blockwise(torch.zeros(1))
    known: dict[int, tuple[Tensor, Tensor]] = {}  # id -> (old, new); holds the old ones, or their ids were used again
    with mode:
        for module in model.modules():
            if is_quantized(module):
                weight: Any = module.weight
                known[id(weight)] = (weight, _packed(module))
            for tensors in (module._parameters, module._buffers):
                replaced: Any = tensors
                for name, tensor in replaced.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in known:
                        fake: Tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                        if isinstance(tensor, nn.Parameter):
                            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                        known[id(tensor)] = (tensor, fake)
                    replaced[name] = known[id(tensor)][1]


def _packed(module: Any) -> nn.Parameter:
    """The weight of a layer of bitsandbytes as its own functions pack it, frozen."""
    functional: Any = sys.modules["bitsandbytes.functional"]
    weight: Any = module.weight
    if hasattr(weight, "quant_type"):
        names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        options = {name: getattr(weight, name) for name in names}
        data, state = functional.quantize_4bit(torch.empty(weight.shape, dtype=module.compute_dtype), **options)
        packed: Any = nn.Parameter(data, requires_grad=False)
        packed.quant_state = module.quant_state = state
    else:
        rows, scales, _ = functional.int8_vectorwise_quant(torch.empty(weight.shape, dtype=torch.float16))
        packed = nn.Parameter(rows, requires_grad=False)
        packed.CB, packed.SCB = rows, scales
    return packed  # type: ignore[no-any-return]
