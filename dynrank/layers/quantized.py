"""Linear layers whose weight bitsandbytes or torchao has packed: telling them, and unpacking one.

Neither is imported here. A program that holds such a layer has imported its library already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dynrank.errors import ConfigurationError
from dynrank.layers.compiled import named_modules


def is_quantized(module: nn.Module) -> bool:
    """Whether it is bitsandbytes' Linear4bit or Linear8bitLt, or a plain linear layer with a weight of torchao."""
    return _computes_as(module, "Linear4bit") or _computes_as(module, "Linear8bitLt") or _has_torchao_weight(module)


def unpacker(module: nn.Module) -> Callable[[], Tensor] | None:
    """A function that unpacks the (d_out, d_in) weight of a packed layer anew on every call.

    None where the layer's own forward has to be used: where it rounds its inputs too (Linear8bitLt, and torchao's
    dynamic quantisation); and where bitsandbytes has put the bits into another order, for its own product.
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


def unpack_fault(module: nn.Module) -> str | None:
    """Why no plain layer can stand for a quantised one, if none can."""
    if _computes_as(module, "Linear8bitLt") or _rounds_inputs(module):
        return (
            "the layer rounds its inputs as well as its weight, as no plain layer does; load the adapter into "
            "the model before quantisation and merge that"
        )
    if _computes_as(module, "Linear4bit") and getattr(module.weight, "quant_state", None) is None:
        return "its weight is not packed yet; move the model to its device first"
    return None


@torch.no_grad()
def unpacked(module: nn.Module) -> nn.Linear:
    """A plain layer with the values that a packed layer stands for, in the dtype that it was packed from; frozen."""
    fault = unpack_fault(module)
    if fault:
        raise ConfigurationError(f"the layer cannot be merged: {fault}")
    # Asking for the state dict undoes the order in which bitsandbytes puts the bits for some CPUs.
    module.state_dict()
    unpack = unpacker(module)
    assert unpack is not None
    values = unpack()
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
    # A part of a model holds the same config, and only the whole counts.
    for module in model.modules():
        roots.setdefault(id(getattr(module, "config", None)), module)
    for root in roots.values():
        config: Any = getattr(root, "config", None)
        settings: Any = getattr(config, "quantization_config", None)
        if getattr(settings, "quant_method", None) not in ("bitsandbytes", "torchao"):
            continue
        linear = {name: module for name, module in named_modules(root) if isinstance(module, nn.Linear)}
        if any(is_quantized(module) for module in linear.values()):
            plain = [name for name, module in linear.items() if not is_quantized(module)]
            of_torchao = settings.quant_method == "torchao"
            setattr(settings, "modules_to_not_convert" if of_torchao else "llm_int8_skip_modules", plain)
            continue
        del config.quantization_config
        for leftover in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_4bit_serializable"):
            vars(root).pop(leftover, None)


def plain_values(weight: Tensor) -> Tensor:
    """The values that a weight of torchao stands for; any other tensor as it is."""
    return weight.detach().dequantize() if _is_of_torchao(weight) else weight.detach()


def _is_of_torchao(weight: Any) -> bool:
    cls = getattr(sys.modules.get("torchao.utils"), "TorchAOBaseTensor", None)
    return cls is not None and isinstance(weight, cls)


def _has_torchao_weight(module: nn.Module) -> bool:
    return type(module).forward is nn.Linear.forward and _is_of_torchao(module.weight)


def _rounds_inputs(module: nn.Module) -> bool:
    """Whether torchao quantises what is multiplied by the weight, too, as it comes."""
    weight = module.weight
    dynamic = type(weight).__name__ == "LinearActivationQuantizedTensor"
    return _is_of_torchao(weight) and (dynamic or getattr(weight, "act_quant_kwargs", None) is not None)


def _computes_as(module: nn.Module, name: str) -> bool:
    """Whether the module's forward is that of a class of bitsandbytes."""
    cls = getattr(sys.modules.get("bitsandbytes.nn"), name, None)
    return cls is not None and isinstance(module, cls) and type(module).forward is cls.forward
