"""Linear layers whose weight bitsandbytes or torchao has packed: how to recognise and unpack one.

This module imports neither. A program with such a layer has imported its library already.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dynrank.errors import ConfigurationError
from dynrank.layers.base import imported
from dynrank.layers.compiled import named_modules


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


def unpack_fault(module: nn.Module) -> str | None:
    """The reason why no plain layer can replace a quantised one; None if one can."""
    if _computes_as(module, "Linear8bitLt") or _rounds_inputs(module):
        return (
            "the layer rounds its inputs as well as its weight, which no plain layer does; load the adapter into "
            "the model before quantisation, and merge it there"
        )
    if _computes_as(module, "Linear4bit") and getattr(module.weight, "quant_state", None) is None:
        return "its weight is not packed yet; move the model to its device first"
    return None


@torch.no_grad()
def unpacked(module: nn.Module) -> nn.Linear:
    """A frozen plain layer with the unpacked values of ``module``, in the dtype before packing."""
    fault = unpack_fault(module)
    if fault:
        raise ConfigurationError(f"the layer cannot be merged: {fault}")
    # state_dict() undoes the reordering of bits that bitsandbytes makes for some CPUs.
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
    """Write into the configs of transformers models in ``model`` which of their layers are still quantised.

    So ``from_pretrained`` can load the saved model; if no layer is quantised, it loads as a plain model.
    """
    roots: dict[int, nn.Module] = {}
    # The parts of a model share its config; setdefault keeps the whole model.
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
    """The unpacked values of a weight of torchao; any other tensor itself."""
    return weight.detach().dequantize() if _is_of_torchao(weight) else weight.detach()


def _is_of_torchao(weight: Any) -> bool:
    return isinstance(weight, imported("torchao.utils.TorchAOBaseTensor"))


def _has_torchao_weight(module: nn.Module) -> bool:
    return type(module).forward is nn.Linear.forward and _is_of_torchao(module.weight)


def _rounds_inputs(module: nn.Module) -> bool:
    """Whether torchao quantises the layer's inputs, too."""
    weight = module.weight
    dynamic = type(weight).__name__ == "LinearActivationQuantizedTensor"
    return _is_of_torchao(weight) and (dynamic or getattr(weight, "act_quant_kwargs", None) is not None)


def _computes_as(module: nn.Module, name: str) -> bool:
    """Whether the forward of ``module`` is that of the class ``name`` of bitsandbytes."""
    cls = imported(f"bitsandbytes.nn.{name}")
    return isinstance(module, cls) and type(module).forward is cls.forward
