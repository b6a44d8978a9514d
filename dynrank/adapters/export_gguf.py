"""An adapter as a GGUF file, for llama.cpp and programs built on it, with every layer at its own rank.

llama.cpp multiplies an update by ``adapter.lora.alpha`` / the rows of its tensor, or by 1 if alpha is 0. So alpha is 0
here, and each lora_B is multiplied by its layer's scaling. For some architectures llama.cpp orders the rows of query
and key differently from transformers; then the rows of lora_B are reordered like those of the base's weight.
"""

from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynrank.adapters.precision import Rounded, Rounding, in_dtype, rounding
from dynrank.adapters.read import Adapter
from dynrank.adapters.stored import refuse_faults
from dynrank.errors import ConfigurationError

# (rows, heads) -> for each row of llama.cpp, the index of its row in transformers.
Order = Callable[[int, int], Tensor]


def _pairs(rows: int, heads: int) -> Tensor:
    """A head rotates rows i and i + half its rows together; in llama.cpp these two rows are adjacent."""
    return torch.arange(rows).view(heads, 2, -1).mT.flatten()


def _parts(rows: int, heads: int) -> Tensor:
    """A head's query, key and value are adjacent; in llama.cpp all queries come first, then keys, then values."""
    return torch.arange(rows).view(heads, 3, -1).transpose(0, 1).flatten()


# Last part of a layer's name -> (the order of its rows, the config key with its number of heads).
_MOVED: Mapping[str, tuple[Order, str]] = {
    "q_proj": (_pairs, "num_attention_heads"),
    "k_proj": (_pairs, "num_key_value_heads"),
    "query_key_value": (_parts, "num_attention_heads"),
}
# model_type of transformers -> (its name in llama.cpp, whether rows are reordered). scripts/bench/check_gguf.py has
# compared each with llama.cpp's own converter.
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "granite": ("granite", True),
    "smollm3": ("smollm3", True),
    "gpt_neox": ("gptneox", True),
    "bloom": ("bloom", True),
    "gemma3_text": ("gemma3", False),
    **{
        name: (name, False)
        for name in ("qwen2", "qwen3", "gemma", "gemma2", "phi3", "olmo2", "starcoder2", "stablelm", "cohere2", "gpt2")
    },
}


def gguf_names(config: Any, layers: Iterable[str]) -> dict[str, str]:
    """{adapted layer: its tensor in llama.cpp}, by the config of the base model."""
    if find_spec("gguf") is None:
        raise ConfigurationError("a GGUF file needs the package gguf: pip install 'dynrank[code]'")
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    known = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    kind, _ = ARCHITECTURES.get(config.model_type, (None, False))
    if kind not in known:
        raise ConfigurationError(
            f"model_type of the base must be one of {sorted(ARCHITECTURES)}, which were tested in llama.cpp, got "
            f"{config.model_type!r}. For any base: dynrank merge, then llama.cpp's convert_hf_to_gguf.py"
        )
    names = get_tensor_name_map(known[kind], config.num_hidden_layers)
    found = {layer: names.get_name(layer) for layer in layers}
    tied = config.tie_word_embeddings
    faults = [f"{layer!r} has no name in llama.cpp" for layer, name in found.items() if name is None]
    faults += [
        f"{layer!r} is tied to the model's output or input embedding, and llama.cpp fails on it"
        for layer, name in found.items()
        if tied and name in ("token_embd", "output")
    ]
    refuse_faults("llama.cpp cannot read this adapter", faults, advice="\nmerge it instead: dynrank merge")
    return {layer: str(name) for layer, name in found.items()}


def write_gguf(
    file: Path, adapter: Adapter, config: Any, names: Mapping[str, str], dtype: torch.dtype | None = None
) -> Rounding | None:
    """Write ``adapter``, trained on a model with ``config``, to ``file``, with :func:`gguf_names`.

    It is in float32, or in bfloat16 if that is the ``dtype``; returns what was lost to a ``dtype`` that is not None.
    """
    from gguf import GGMLQuantizationType, GGUFType, GGUFWriter, Keys

    kind, moves = ARCHITECTURES[config.model_type]
    writer = GGUFWriter(file, kind)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, 0.0)
    stored = dict[str, tuple[Rounded, float]]()
    for layer, name in names.items():
        lora_B, lora_A = adapter.factors(layer)
        lora_B = lora_B.double() * adapter.layers[layer].scaling
        order, heads = _MOVED.get(layer.rpartition(".")[2], (None, ""))
        if moves and order is not None:
            lora_B = lora_B[order(len(lora_B), getattr(config, heads))]
        new = in_dtype(lora_B, lora_A, dtype or torch.float32)
        stored[layer] = new, 1.0
        # llama.cpp looks up rows of an embedding, so it stores this factor transposed.
        for part, factor in (("a", new.lora_A.T if name == "token_embd" else new.lora_A), ("b", new.lora_B)):
            values = factor.contiguous()
            # NumPy has no bfloat16, so its bytes are given.
            narrow = dtype == torch.bfloat16
            array = (values.view(torch.uint8) if narrow else values).numpy()
            writer.add_tensor(
                f"{name}.weight.lora_{part}", array, raw_dtype=GGMLQuantizationType.BF16 if narrow else None
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return rounding(stored) if dtype is not None else None
