"""Linear layers whose weight bitsandbytes has packed into 4 or 8 bits: telling them, and unpacking one.

bitsandbytes is not imported here. A program that holds such a layer has imported it already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dynrank.errors import ConfigurationError
from dynrank.layers.compiled import named_modules

__all__ = ["computes_in", "is_quantized", "mark_unpacked", "unpack_fault", "unpacked", "unpacker"]


def is_quantized(module: nn.Module) -> bool:
    """Whether it is bitsandbytes' Linear4bit or Linear8bitLt, or a subclass that computes the same."""
    return _computes_as(module, "Linear4bit") or _computes_as(module, "Linear8bitLt")


def unpack_fault(module: nn.Module) -> str | None:
    """Why no plain layer can stand for a quantised one, if none can."""
    if not _computes_as(module, "Linear4bit"):
        return (
            "a layer in 8 bits rounds its inputs as well as its weight, as no plain layer does; load the adapter into "
            "the model before quantisation and merge that"
        )
    if getattr(module.weight, "quant_state", None) is None:
        return "its weight is not packed yet; move the model to its device first"
    return None


def unpacker(module: nn.Module) -> Callable[[], Tensor] | None:
    """What returns the (d_out, d_in) weight that a 4-bit layer stands for, anew on every call.

    None where the layer's own forward has to be used: in 8 bits, where it rounds its inputs too; and where bitsandbytes
    has put the bits into another order, for its own product.
    """
    if not _computes_as(module, "Linear4bit"):
        return None
    modules: Any = sys.modules["bitsandbytes.nn.modules"]
    modules.fix_4bit_weight_quant_state_from_module(module)
    functional: Any = sys.modules["bitsandbytes.functional"]
    weight: Any = module.weight
    state = weight.quant_state
    if getattr(state, "packing_format_for_cpu", False) or tuple(state.shape) != (
        module.out_features,
        module.in_features,
    ):
        return None
    return lambda: functional.dequantize_4bit(weight.data, state)


def computes_in(module: nn.Module, x: Tensor) -> torch.dtype:
    """The dtype in which a 4-bit layer multiplies ``x``."""
    dtype = module.compute_dtype if module.compute_type_is_set else None
    return dtype if isinstance(dtype, torch.dtype) else x.dtype


@torch.no_grad()
def unpacked(module: nn.Module) -> nn.Linear:
    """A plain layer with the values that a 4-bit layer stands for, in the dtype that it was packed from; frozen.

    Raises:
        ConfigurationError: if there is none, see :func:`unpack_fault`.
    """
    fault = unpack_fault(module)
    if fault:
        raise ConfigurationError(f"the layer cannot be merged: {fault}")
    module.state_dict()  # undoes the order in which bitsandbytes puts the bits for some CPUs
    weight: Any = module.weight
    state = weight.quant_state
    functional: Any = sys.modules["bitsandbytes.functional"]
    values = functional.dequantize_4bit(weight.data, state).reshape(state.shape)
    plain = nn.Linear(values.shape[1], values.shape[0], bias=False, device="meta")
    plain.weight = nn.Parameter(values, requires_grad=False)
    bias = module.bias
    if isinstance(bias, nn.Parameter):
        plain.bias = nn.Parameter(bias.detach().to(values.dtype), requires_grad=False)
    return plain.train(module.training)


def mark_unpacked(model: nn.Module) -> None:
    """Make the configs of transformers models in ``model`` say which of their layers are quantised still.

    What ``save_pretrained`` writes then loads again: as a plain model if none is.
    """
    roots: dict[int, nn.Module] = {}
    for module in model.modules():  # a part of a model holds the same config, and only the whole counts
        roots.setdefault(id(getattr(module, "config", None)), module)
    for root in roots.values():
        config: Any = getattr(root, "config", None)
        settings: Any = getattr(config, "quantization_config", None)
        if getattr(settings, "quant_method", None) != "bitsandbytes":
            continue
        linear = {name: module for name, module in named_modules(root) if isinstance(module, nn.Linear)}
        if any(is_quantized(module) for module in linear.values()):
            settings.llm_int8_skip_modules = [name for name, module in linear.items() if not is_quantized(module)]
            continue
        del config.quantization_config
        for leftover in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_4bit_serializable"):
            vars(root).pop(leftover, None)


def _computes_as(module: nn.Module, name: str) -> bool:
    """Whether the module's forward is that of a class of bitsandbytes."""
    cls = getattr(sys.modules.get("bitsandbytes.nn"), name, None)
    return cls is not None and isinstance(module, cls) and type(module).forward is cls.forward
