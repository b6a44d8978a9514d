"""Packing a frozen base's linear layers by bitsandbytes, in a model with weights and in one on the meta device."""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from dynrank.errors import ConfigurationError
from dynrank.models.settings import ModelSettings


def packing_of(settings: ModelSettings, dtype: torch.dtype, kept: Sequence[str]) -> BitsAndBytesConfig:
    """The config for ``from_pretrained`` that packs all linear layers except ``kept`` (if empty, the output head)."""
    for package in ("bitsandbytes", "accelerate"):
        if find_spec(package) is None:
            needed = f"model.quantization={settings.quantization} needs {package}"
            raise ConfigurationError(f"{needed}: pip install 'dynrank[hf,optimizers]'")
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    options = {"load_in_4bit": True, **nf4} if settings.quantization == "nf4" else {"load_in_8bit": True}
    return BitsAndBytesConfig(**options, llm_int8_skip_modules=[*kept] or None)


def pack(model: PreTrainedModel, packing: BitsAndBytesConfig, dtype: torch.dtype) -> None:
    """Put bitsandbytes' layers into a model on the meta device, in place, as ``from_pretrained`` does."""
    # At the head of the file, this import would load every installed library of quantisation.
    from transformers.quantizers import AutoHfQuantizer

    before = torch.get_default_dtype()
    # New layers create their biases in the default dtype.
    torch.set_default_dtype(dtype)
    try:
        AutoHfQuantizer.from_config(packing, pre_quantized=False).preprocess_model(model, device_map={"": "cpu"})
    finally:
        torch.set_default_dtype(before)


def keep_packing(model: nn.Module) -> None:
    """Keep bitsandbytes from packing NF4 weights again in every evaluation on CPUs with AVX512-BF16.

    It does so for its own product. That product does not support every shape, and undoing the packing is not exact.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010, for mypy
