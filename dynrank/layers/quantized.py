"""Linear layers whose weight bitsandbytes or torchao has packed: how to recognise and unpack one.

This module imports neither. A program with such a layer has imported its library already.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dynrank.layers.foreign import class_if_imported


def is_quantized(module: nn.Module) -> bool:
    """Whether ``module`` is bitsandbytes' Linear4bit or Linear8bitLt, or a linear layer with a weight of torchao."""
    return _computes_as(module, "Linear4bit") or _computes_as(module, "Linear8bitLt") or _has_torchao_weight(module)


def unpacker(module: nn.Module) -> Callable[[], Tensor] | None:
    """A function that unpacks the (d_out, d_in) weight of a packed layer on every call.

    None if only the layer's own forward can be used: because it rounds its inputs, too (Linear8bitLt, and torchao's
    dynamic quantisation), or because bitsandbytes has reordered the bits for its own product.
    """
    if _has_torchao_weight(module) and not _rounds_inputs(module):
        return module.get_parameter("weight").detach().dequantize
    if not _computes_as(module, "Linear4bit"):
        return None
    modules: Any = sys.modules["bitsandbytes.nn.modules"]
    modules.fix_4bit_weight_quant_state_from_module(module)
    functional: Any = sys.modules["bitsandbytes.functional"]
    weight: Any = module.weight
    state = weight.quant_state
    shape = (module.out_features, module.in_features)
    if getattr(state, "packing_format_for_cpu", False) or tuple(state.shape) != shape:
        return None
    return lambda: functional.dequantize_4bit(weight.data, state)


def computes_in(module: nn.Module, x: Tensor) -> torch.dtype:
    """The dtype in which a packed layer that can be unpacked multiplies ``x``."""
    dtype = getattr(module, "compute_dtype", None) if getattr(module, "compute_type_is_set", False) else None
    return dtype if isinstance(dtype, torch.dtype) else x.dtype


def plain_values(weight: Tensor) -> Tensor:
    """The unpacked values of a weight of torchao; any other tensor itself."""
    return weight.detach().dequantize() if _is_of_torchao(weight) else weight.detach()


def _is_of_torchao(weight: Any) -> bool:
    return isinstance(weight, class_if_imported("torchao.utils.TorchAOBaseTensor"))


def _has_torchao_weight(module: nn.Module) -> bool:
    return type(module).forward is nn.Linear.forward and _is_of_torchao(module.weight)


def _rounds_inputs(module: nn.Module) -> bool:
    """Whether torchao quantises the layer's inputs, too."""
    weight = module.weight
    dynamic = type(weight).__name__ == "LinearActivationQuantizedTensor"
    return _is_of_torchao(weight) and (dynamic or getattr(weight, "act_quant_kwargs", None) is not None)


def _computes_as(module: nn.Module, name: str) -> bool:
    """Whether the forward of ``module`` is that of the class ``name`` of bitsandbytes."""
    cls = class_if_imported(f"bitsandbytes.nn.{name}")
    return isinstance(module, cls) and type(module).forward is cls.forward
