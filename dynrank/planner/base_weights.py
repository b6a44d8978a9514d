"""Giving a model on the meta device the dtype or the packing of a frozen base, and tensors without values."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import BitsAndBytesConfig, PreTrainedModel

from dynrank.errors import ConfigurationError
from dynrank.layers.quantized import is_quantized

__all__ = ["DTYPES", "PACKED", "set_weights", "without_values"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PACKED = ("nf4", "int8")


def set_weights(
    model: PreTrainedModel, kind: str | None, default: torch.dtype | None, *, double: bool, kept: Sequence[str]
) -> str:
    """Bring all parameters to a dtype, and pack the linear layers that transformers would pack, in place.

    Args:
        model: on the meta device.
        kind: a name in ``DTYPES``, "nf4" (QLoRA, arXiv:2305.14314) or "int8" (LLM.int8(), arXiv:2208.07339).
        default: dtype if ``kind`` is None; None leaves the model's own.
        double: with nf4, the scales of the blocks are quantised, too.
        kept: names of modules that are not packed, beside embeddings, norms and the output head.

    Returns:
        The name of the dtype or packing that the model has now.

    Raises:
        ConfigurationError: if a packing needs bitsandbytes, which is not installed.
    """
    packed = kind in PACKED
    dtype = torch.bfloat16 if packed else DTYPES.get(kind or "", default)
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    if packed:
        _pack_linear(model, str(kind), double=double, kept=kept)
    names = {dtype: name for name, dtype in DTYPES.items()}
    return kind or names.get(model.dtype, str(model.dtype).removeprefix("torch."))


def _pack_linear(model: PreTrainedModel, kind: str, *, double: bool, kept: Sequence[str]) -> None:
    if find_spec("bitsandbytes") is None:
        raise ConfigurationError(f"weights={kind} needs bitsandbytes: pip install 'dynrank[optimizers]'")
    # these import bitsandbytes, and other libraries of quantisation if they are installed
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import HfQuantizer

    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double, "bnb_4bit_compute_dtype": model.dtype}
    options = {"load_in_4bit": True, **nf4} if kind == "nf4" else {"load_in_8bit": True}
    skipped = HfQuantizer.get_modules_to_not_convert(model, keep_in_fp32_modules=model._keep_in_fp32_modules)
    replace_with_bnb_linear(model, [*skipped, *kept], BitsAndBytesConfig(**options))


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
