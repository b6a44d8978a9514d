"""Adapters to disk, in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from dynrank.adapters.config import CONFIG_FILE, make_config
from dynrank.adapters.stored import PREFIX, WEIGHTS_FILE
from dynrank.errors import ConfigurationError
from dynrank.layers.base import LoRALayer
from dynrank.layers.compiled import named_modules, plain_name, uncompiled
from dynrank.layers.finding import own_layers
from dynrank.layers.kinds import LoRAConv2d, LoRAEmbedding
from dynrank.layers.peft_layers import refuse_peft

__all__ = ["save_adapter"]


def save_adapter(model: nn.Module, path: str | Path, *, layout: str = "native") -> None:
    """Write the LoRA layers of ``model``, and its other trainable parts (a head), as a PEFT adapter.

    A file is complete or absent: each is written beside its place and then renamed into it.

    Args:
        model: a model with LoRA layers, compiled or not. Modules outside them that hold parameters with requires_grad
            are saved whole (PEFT's ``modules_to_save``).
        path: folder to write to; made if missing.
        layout: "native" writes each layer at its own rank, with rank_pattern and alpha_pattern where they differ.
            "padded" writes every layer at the largest rank (rows of zeros, scaling folded into lora_B), so that the one
            global ``lora_alpha / r`` is right for all of them: for readers that know no patterns, such as llama.cpp.

    Raises:
        ConfigurationError: if the model has no LoRA layers, or PEFT's, or ``layout`` is unknown.
    """
    refuse_peft(model, "save_adapter", "call its save_pretrained()")
    model = uncompiled(model)
    layers = own_layers(model)
    if not layers:
        raise ConfigurationError("the model has no LoRA layers to save; call dynrank.add_lora first")
    if layout not in _LAYOUTS:
        raise ConfigurationError(f"layout must be one of {[*_LAYOUTS]}, got {layout!r}")
    written = _LAYOUTS[layout](layers)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        lora_A, lora_B, _ = written[name]
        tensors |= {f"{PREFIX}{name}.{key}": value for key, value in _to_peft(layer, lora_A, lora_B).items()}
    heads = trained_heads(model, layers)
    for head in heads:
        if any(name.startswith(f"{head}." if head else "") for name in layers):
            raise ConfigurationError(
                f"{head or 'the model'!r} holds LoRA layers and a trainable parameter of its own, which PEFT's format "
                "cannot store; freeze it before save_adapter, or save it yourself"
            )
        values = model.get_submodule(head).state_dict()
        tensors |= {f"{PREFIX}{plain_name(f'{head}.{key}')}": value for key, value in values.items()}
    config = make_config(
        {name: (len(lora_A), scaling * len(lora_A)) for name, (lora_A, _, scaling) in written.items()},
        target_modules=target_modules(model, layers),
        modules_to_save=heads,
        dropout=max(layer.dropout.p for layer in layers.values()),
        base=getattr(getattr(model, "config", None), "_name_or_path", ""),
        base_class=type(model) if hasattr(model, "config") else None,
    )
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    weights, settings = folder / WEIGHTS_FILE, folder / CONFIG_FILE
    own = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    save_file(own, f"{weights}.part", metadata={"format": "pt"})
    Path(f"{settings}.part").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if weights.exists():
        shutil.copyfile(weights, f"{weights}.old")  # over what a killed run may have left
    try:
        os.replace(f"{weights}.part", weights)
        os.replace(f"{settings}.part", settings)
    except OSError:
        if Path(f"{weights}.old").exists():  # the new weights must not stand beside the old settings
            os.replace(f"{weights}.old", weights)
        raise
    Path(f"{weights}.old").unlink(missing_ok=True)


def target_modules(model: nn.Module, layers: Mapping[str, LoRALayer]) -> list[str] | str:
    """Names of the adapted modules; one exact expression where PEFT would also take a module ending in one of them."""
    inside = tuple(f"{name}." for name in layers)
    others = [name for name, _ in named_modules(model) if name not in layers and not name.startswith(inside)]
    if any(other.endswith(f".{name}") for other in others for name in layers):
        return "|".join(re.escape(name) for name in layers)
    return list(layers)


def _native(layers: Mapping[str, LoRALayer]) -> dict[str, tuple[Tensor, Tensor, float]]:
    """{layer: (lora_A, lora_B, scaling)} as they are."""
    return {name: (layer.lora_A.detach(), layer.lora_B.detach(), layer.scaling) for name, layer in layers.items()}


def _padded(layers: Mapping[str, LoRALayer]) -> dict[str, tuple[Tensor, Tensor, float]]:
    """The same updates at one rank and one scaling: the largest of each, so that no factor grows."""
    rank = max(layer.rank for layer in layers.values())
    scaling = max((layer.scaling for layer in layers.values()), key=abs) or 1.0
    padded = {}
    for name, (lora_A, lora_B, own) in _native(layers).items():
        missing = rank - len(lora_A)
        padded[name] = F.pad(lora_A, (0, 0, 0, missing)), F.pad(lora_B * (own / scaling), (0, missing)), scaling
    return padded


_LAYOUTS = {"native": _native, "padded": _padded}


def _to_peft(layer: LoRALayer, lora_A: Tensor, lora_B: Tensor) -> dict[str, Tensor]:
    if isinstance(layer, LoRAEmbedding):
        return {"lora_embedding_A": lora_A, "lora_embedding_B": lora_B}
    if isinstance(layer, LoRAConv2d):
        filters = lora_A.view(len(lora_A), *layer.weight.shape[1:])
        return {"lora_A.weight": filters, "lora_B.weight": lora_B[:, :, None, None]}
    return {"lora_A.weight": lora_A, "lora_B.weight": lora_B}


def trained_heads(model: nn.Module, layers: Mapping[str, LoRALayer]) -> list[str]:
    """Innermost modules outside the LoRA layers that hold a trainable parameter of their own."""
    inside = {id(module) for layer in layers.values() for module in layer.modules()}
    return [
        name
        for name, module in named_modules(model)
        if id(module) not in inside and any(p.requires_grad for p in module.parameters(recurse=False))
    ]
