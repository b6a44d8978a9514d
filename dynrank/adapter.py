"""Adapters on disk, in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dynrank.adapter_config import CONFIG_FILE, alpha_of, make_config, read_config
from dynrank.adapter_file import PREFIX, WEIGHTS_FILE, sort_keys, weights_path
from dynrank.errors import ConfigurationError
from dynrank.layers.adapted import LoRAConv2d, LoRAEmbedding, layer_class
from dynrank.layers.base import LoRALayer, initial_scaling
from dynrank.layers.inject import make_layer, own_layers, place_layers, tied_weights
from dynrank.layers.peft_layers import refuse_peft

__all__ = ["load_adapter", "save_adapter"]

M = TypeVar("M", bound=nn.Module)


def save_adapter(model: nn.Module, path: str | Path, *, layout: str = "native") -> None:
    """Write the LoRA layers of ``model``, and its other trainable parts (a head), as a PEFT adapter.

    A file is complete or absent: each is written beside its place and then renamed into it.

    Args:
        model: a model with LoRA layers. Modules outside them that hold parameters with requires_grad are saved whole
            (PEFT's ``modules_to_save``).
        path: folder to write to; made if missing.
        layout: "native" writes each layer at its own rank, with rank_pattern and alpha_pattern where they differ.
            "padded" writes every layer at the largest rank (rows of zeros, scaling folded into lora_B), so that the one
            global ``lora_alpha / r`` is right for all of them: for readers that know no patterns, such as llama.cpp.

    Raises:
        ConfigurationError: if the model has no LoRA layers, or PEFT's, or ``layout`` is unknown.
    """
    refuse_peft(model, "save_adapter", "call its save_pretrained()")
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
        tensors |= {f"{PREFIX}{head}.{key}": value for key, value in model.get_submodule(head).state_dict().items()}
    config = make_config(
        {name: (len(lora_A), scaling * len(lora_A)) for name, (lora_A, _, scaling) in written.items()},
        target_modules=target_modules(model, layers),
        modules_to_save=heads,
        dropout=max(layer.dropout.p for layer in layers.values()),
        base=getattr(getattr(model, "config", None), "_name_or_path", ""),
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


def load_adapter(model: M, path: str | Path, *, dtype: torch.dtype = torch.float32) -> M:
    """Put the LoRA layers of a PEFT adapter (ours or PEFT's) into a plain model, in place, and load them.

    Ranks come from the tensors, scaling from the config by PEFT's rules. Everything is checked before the model is
    touched.

    Args:
        model: the model that the adapter was trained on, without LoRA layers.
        path: folder with adapter_config.json and adapter_model.safetensors.
        dtype: dtype of the factors.

    Returns:
        ``model`` itself; adapters and saved heads are trainable, all else is frozen.

    Raises:
        ConfigurationError: if a file is missing, broken or not a LoRA adapter, uses a variant with other arithmetic, or
            does not fit the model.
    """
    refuse_peft(model, "load_adapter", "call its load_adapter(), or pass the plain model")
    if own_layers(model):
        raise ConfigurationError(
            "the model has LoRA layers already; merge them first (dynrank.merge) or load a plain model"
        )
    folder = Path(path)
    config, tensors = read_config(folder), _read_tensors(folder)
    modules = dict(model.named_modules())
    factors, others = _sort_tensors(tensors, folder)
    faults: list[str] = []
    layers = {}
    for name, pair in factors.items():
        fault = _layer_fault(name, pair, modules.get(name))
        if fault:
            faults.append(fault)
            continue
        lora_A, lora_B = _from_peft(pair)
        alpha = alpha_of(config, name)
        layers[name] = (lora_A, lora_B, initial_scaling(alpha, pair["A"].shape[0], bool(config.get("use_rslora"))))
    heads, head_faults = _head_tensors(model, others, list(config.get("modules_to_save") or []), set(layers))
    faults += head_faults
    if faults:
        raise ConfigurationError(
            f"the adapter {str(folder)!r} does not fit the model (task.model):\n  " + "\n  ".join(faults[:20])
        )

    placed = {}
    for name, (lora_A, lora_B, scaling) in layers.items():
        layer = make_layer(
            modules[name], rank=lora_A.shape[0], scaling=scaling, dropout=config.get("lora_dropout") or 0.0, dtype=dtype
        )
        with torch.no_grad():
            layer.lora_A.copy_(lora_A)
            layer.lora_B.copy_(lora_B)
        placed[name] = layer
    place_layers(model, placed, sorted({name.rpartition(".")[0] for name in heads}))
    current: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, tensor in heads.items():
            current[name].copy_(tensor)
    return model


def target_modules(model: nn.Module, layers: Mapping[str, LoRALayer]) -> list[str] | str:
    """Names of the adapted modules; one exact expression where PEFT would also take a module ending in one of them."""
    inside = tuple(f"{name}." for name in layers)
    others = [name for name, _ in model.named_modules() if name not in layers and not name.startswith(inside)]
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


def _from_peft(pair: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The factors as matrices, without padding beyond the highest rank that their product can have."""
    lora_A, lora_B = pair["A"].flatten(1), pair["B"].flatten(1)
    most = min(lora_A.shape[1], lora_B.shape[0])
    if lora_A.shape[0] == lora_B.shape[1] and not (lora_A[most:].any() or lora_B[:, most:].any()):
        return lora_A[:most], lora_B[:, :most]
    return lora_A, lora_B


def trained_heads(model: nn.Module, layers: Mapping[str, LoRALayer]) -> list[str]:
    """Innermost modules outside the LoRA layers that hold a trainable parameter of their own."""
    inside = {id(module) for layer in layers.values() for module in layer.modules()}
    return [
        name
        for name, module in model.named_modules()
        if id(module) not in inside and any(p.requires_grad for p in module.parameters(recurse=False))
    ]


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    file = weights_path(folder)
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (a safe_open is no mapping)
    except (SafetensorError, OSError) as error:
        raise ConfigurationError(f"{str(file)!r} is not a whole safetensors file: {error}") from None


def _sort_tensors(
    tensors: Mapping[str, Tensor], folder: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """({layer: {"A": ..., "B": ...}}, everything else by its name in the model)."""
    factors, others = sort_keys(tensors, folder)
    pairs = {layer: {factor: tensors[key] for factor, key in pair.items()} for layer, pair in factors.items()}
    return pairs, {name: tensors[key] for name, key in others.items()}


def _layer_fault(name: str, pair: Mapping[str, Tensor], base: nn.Module | None) -> str | None:
    if base is None:
        return f"the model has no module {name!r}"
    cls = layer_class(base)
    if cls is None:
        return f"{name!r} is a {type(base).__name__}, which cannot have LoRA"
    if set(pair) != {"A", "B"} or pair["A"].ndim < 2 or pair["B"].ndim < 2:
        return f"{name!r} lacks two factors of two dimensions or more"
    (d_out, d_in), (lora_A, lora_B) = cls.shape_of(base), _from_peft(pair)
    rank = lora_A.shape[0]
    if lora_A.shape != (rank, d_in) or lora_B.shape != (d_out, rank) or not 1 <= rank <= min(d_out, d_in):
        return f"{name!r} is a ({d_out}, {d_in}) layer, its factors are {[*lora_A.shape]} and {[*lora_B.shape]}"
    if not (torch.isfinite(lora_A).all() and torch.isfinite(lora_B).all()):
        return f"{name!r} holds NaN or inf"
    return None


def _head_tensors(
    model: nn.Module, others: Mapping[str, Tensor], modules_to_save: Sequence[str], adapted: set[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors of modules_to_save by parameter name, faults); a base weight stored along must equal the model's."""
    current: dict[str, Tensor] = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    tied = tied_weights(model)
    heads, faults = {}, []
    for name, value in others.items():
        owner, _, leaf = name.rpartition(".")
        target = name
        if owner.endswith(".base_layer") and owner.removesuffix(".base_layer") in adapted:
            target = f"{owner.removesuffix('.base_layer')}.{leaf}"
        if target not in current:
            faults.append(f"the model has no parameter {target!r}")
        elif id(current[target]) in tied and any(_is_part(owner, saved) for saved in modules_to_save):
            faults.append(f"{target!r} is tied to another weight in the model, and a copy of its own in the adapter")
        elif not torch.isfinite(value).all():
            faults.append(f"{target!r} holds NaN or inf in the adapter")
        elif current[target].shape != value.shape:
            faults.append(f"{target!r} is {[*current[target].shape]} in the model and {[*value.shape]} in the adapter")
        elif any(_is_part(owner, saved) for saved in modules_to_save):
            heads[target] = value
        elif not torch.equal(current[target].cpu().to(value.dtype), value):
            faults.append(
                f"{target!r} of the base model has other values in the adapter: it was trained on another base"
            )
    return heads, faults


def _is_part(module: str, saved: str) -> bool:
    return re.search(rf"(^|\.){re.escape(saved)}(\.|$)", module) is not None
