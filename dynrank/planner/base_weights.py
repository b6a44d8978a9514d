"""The dtype or the packing of a frozen base, set without any values of its weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import BitsAndBytesConfig, PreTrainedModel

from dynrank.errors import ConfigurationError
from dynrank.layers.quantized import is_quantized

__all__ = ["DTYPES", "PACKED", "check_weights", "pack_linear", "without_values"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PACKED = ("nf4", "int8")


def check_weights(kind: str | None, key: str = "weights") -> None:
    """Refuse a kind of weights that is none, or whose package is not installed.

    Raises:
        ConfigurationError: naming it.
    """
    if kind is not None and kind not in (*DTYPES, *PACKED):
        raise ConfigurationError(f"{key} must be null or one of {[*DTYPES, *PACKED]}, got {kind!r}")
    if kind in PACKED:
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise ConfigurationError(
                f"{key}={kind} needs bitsandbytes ({error}): pip install 'dynrank[optimizers]'"
            ) from error


def pack_linear(model: PreTrainedModel, kind: str, *, double: bool, kept: Sequence[str] = ()) -> None:
    """Put bitsandbytes' layers in the place of linear ones, the ones that transformers would choose, in place.

    Args:
        model: on the meta device; embeddings, norms, and the output head keep their dtype.
        kind: ``nf4`` (QLoRA, arXiv:2305.14314) or ``int8`` (LLM.int8(), arXiv:2208.07339).
        double: with nf4, the scales of the blocks are quantised, too.
        kept: names of further modules that keep their dtype.
    """
    # these import bitsandbytes, and other libraries of quantisation where they are installed
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import HfQuantizer

    if kind == "nf4":
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=model.dtype,
        )
    else:
        settings = BitsAndBytesConfig(load_in_8bit=True)
    skipped = HfQuantizer.get_modules_to_not_convert(model, keep_in_fp32_modules=model._keep_in_fp32_modules)
    replace_with_bnb_linear(model, [*skipped, *kept], settings)


def without_values(model: nn.Module, mode: FakeTensorMode) -> None:
    """Put fake CPU tensors in the place of all parameters and buffers, in place: bytes and dtypes, but no memory.

    Weights of bitsandbytes' layers are packed by bitsandbytes itself. Ties between parameters stay.
    """
    if any(is_quantized(module) for module in model.modules()):  # tables made within the mode would have no values
        functional: Any = sys.modules["bitsandbytes.functional"]
        functional.quantize_blockwise(torch.zeros(1))
    known: dict[int, tuple[Tensor, Tensor]] = {}  # holds the old ones, whose ids must not be used again
    with mode:
        for module in model.modules():
            if is_quantized(module):
                weight: Any = module.weight
                known[id(weight)] = (weight, _packed(module))
            for tensors in (module._parameters, module._buffers):
                kept: Any = tensors
                for name, tensor in kept.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in known:
                        fake: Tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                        if isinstance(tensor, nn.Parameter):
                            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                        known[id(tensor)] = (tensor, fake)
                    kept[name] = known[id(tensor)][1]


def _packed(module: Any) -> nn.Parameter:
    """The weight of one of bitsandbytes' layers as its own functions pack it, frozen."""
    functional: Any = sys.modules["bitsandbytes.functional"]
    weight: Any = module.weight
    if hasattr(weight, "quant_type"):
        data, state = functional.quantize_4bit(
            torch.empty(weight.shape, dtype=module.compute_dtype),
            blocksize=weight.blocksize,
            compress_statistics=weight.compress_statistics,
            quant_type=weight.quant_type,
            quant_storage=weight.quant_storage,
        )
        packed: Any = nn.Parameter(data, requires_grad=False)
        packed.quant_state = module.quant_state = state
        return packed  # type: ignore[no-any-return]
    rows, scales, _ = functional.int8_vectorwise_quant(torch.empty(weight.shape, dtype=torch.float16))
    packed = nn.Parameter(rows, requires_grad=False)
    packed.CB, packed.SCB = rows, scales
    return packed  # type: ignore[no-any-return]
