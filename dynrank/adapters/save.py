"""Saving adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import json
import os
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from dynrank.adapters.config import CONFIG_FILE
from dynrank.adapters.read import PREFIX, WEIGHTS_FILE, Adapter, wrapper_names
from dynrank.adapters.stored import Factors
from dynrank.distributed.sharding import plain_class
from dynrank.errors import ConfigurationError, DivergedError
from dynrank.layers.base import LoRALayer
from dynrank.layers.compiled import named_modules, plain_name, uncompiled
from dynrank.layers.experts import LoRAParameter
from dynrank.layers.finding import own_layers
from dynrank.layers.foreign import stored_on
from dynrank.layers.kinds import LoRAConv2d, LoRAEmbedding
from dynrank.layers.padded import live_values
from dynrank.layers.peft_layers import peft_layers
from dynrank.linalg import finite
from dynrank.output.whole_file import os_errors, whole_file
from dynrank.private import source_of, stacked_as
from dynrank.rank_map import peft_ranks

# The names that PEFT takes for experts in checkpoints of transformers 4, by the family that others are stacked as.
_TAKEN_FOR_EXPERTS = {"mixtral": ("w1", "w2", "w3"), "qwen2_moe": ("gate_proj", "up_proj", "down_proj")}


def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Write the LoRA layers of ``model``, and its other trainable parts (a head), as a PEFT adapter.

    Each layer keeps its own rank. For a server that reads only one rank for all, see :func:`dynrank.export_adapter`.
    Each file is complete or absent, even after a crash. Only one process may write to a folder at a time.

    Args:
        model: a model with LoRA layers, compiled or not. Modules outside them that have parameters with requires_grad
            are saved whole (PEFT's ``modules_to_save``). If get_peft_model has returned the model, its active adapter
            is saved as save_pretrained would.
        path: folder to write to; made if missing.

    Raises:
        ConfigurationError: if the model has no LoRA layers, or a value is not finite in float32.
        OSError: if the files cannot be written; earlier files are kept.

    >>> import tempfile, torch, dynrank
    >>> folder = tempfile.mkdtemp()
    >>> dynrank.save_adapter(dynrank.add_lora(torch.nn.Sequential(torch.nn.Linear(8, 8)), rank=4), folder)
    >>> {name: layer.rank for name, layer in dynrank.read_adapter(folder).layers.items()}
    {'0': 4}
    """
    model = uncompiled(model)
    with live_values(model):
        _save(model, path)


def _save(model: nn.Module, path: str | Path) -> None:
    if peft_layers(model):
        _save_wrapped(model, Path(path))
        return
    layers = own_layers(model)
    if not layers:
        raise ConfigurationError("the model has no LoRA layers to save; call dynrank.add_lora first")
    of_parameters = [name for name, layer in layers.items() if isinstance(layer, LoRAParameter)]
    places = wrapper_names(of_parameters)
    tensors = dict[str, Tensor]()
    for name, layer in layers.items():
        place = places.get(name, name)
        tensors |= {f"{place}.{key}": value for key, value in _to_peft(layer).items()}
    heads = trained_heads(model, layers)
    for head in heads:
        if any(name.startswith(f"{head}." if head else "") for name in layers):
            raise ConfigurationError(
                f"{head or 'the model'!r} has LoRA layers and a trainable parameter of its own, which PEFT's format "
                "cannot store; freeze the parameter before save_adapter, or save it yourself"
            )
        values = model.get_submodule(head).state_dict()
        tensors |= {plain_name(f"{head}.{key}"): value for key, value in values.items()}
    _check_finite(tensors)
    cls = plain_class(model)
    base_class = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": source_of(model) or None,
        "revision": stored_on(model, "revision"),
        # PEFT's AutoPeftModel and ``dynrank merge`` read the class.
        "auto_mapping": base_class if hasattr(model, "config") else None,
        "inference_mode": True,
        **peft_ranks({name: (layer.rank, layer.alpha) for name, layer in layers.items()}),
        # Beside target_parameters PEFT refuses any other dropout.
        "lora_dropout": 0.0 if of_parameters else max(layer.dropout.p for layer in layers.values()),
        "target_modules": target_modules(model, [name for name in layers if name not in places]),
        "target_parameters": of_parameters or None,
        "modules_to_save": heads or None,
        "bias": "none",
    }
    _warn_of_misread(model, [name for name in layers if name not in places], heads)
    own = {PREFIX + name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    write_adapter(Path(path), own, config)


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write the two files of an adapter, and replace earlier ones; ``tensors`` are contiguous and on the CPU."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = whole_file(folder / WEIGHTS_FILE)
    settings_file = whole_file(folder / CONFIG_FILE)
    with weights as weights_part, settings_file as config_part, os_errors(folder):
        config_part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(dict(tensors), weights_part, metadata={"format": "pt"})
        # By default only the owner can read a file of safetensors.
        weights_part.chmod(config_part.stat().st_mode)


def rewrite_adapter(folder: Path, adapter: Adapter, factors: Mapping[str, Factors]) -> None:
    """Write ``adapter`` to ``folder`` with other factors; keys, dtypes, other tensors and other settings are kept."""
    tensors = {key: adapter.tensor(key) for key in adapter.others.values()}
    settings = {}
    for name, (lora_A, lora_B, scaling) in factors.items():
        layer = adapter.layers[name]
        rows = len(lora_A)
        tensors[layer.keys[0]] = lora_A.reshape(rows, -1, *layer.kernel).contiguous()
        tensors[layer.keys[1]] = lora_B.reshape(-1, rows, *[1] * len(layer.kernel)).contiguous()
        settings[name] = rows // layer.experts, scaling * (rows // layer.experts)
    config = adapter.config.model_dump(exclude_unset=True) | peft_ranks(settings)
    # PEFT would initialise the factors again on loading, and "orthogonal" supports even ranks only.
    if config.get("init_lora_weights") == "orthogonal":
        config["init_lora_weights"] = True
    write_adapter(folder, tensors, config)


def _save_wrapped(model: nn.Module, folder: Path) -> None:
    """Write the active adapter of PEFT's ``model``."""
    # Importing peft takes a second, and only models of PEFT need it, whose user has imported it already.
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise ConfigurationError(
            f"model must be what PEFT's get_peft_model returned, got a {type(model).__name__} that contains it; "
            "pass the PeftModel to save_adapter"
        )
    _check_finite({name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad})
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as place:
        model.save_pretrained(place, selected_adapters=[model.active_adapter])
        # PEFT writes an adapter that is not named "default" to a folder of its name.
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            (written,) = Path(place).rglob(name)
            written.chmod(folder.stat().st_mode & 0o666)
            os.replace(written, folder / name)


def _warn_of_misread(model: nn.Module, modules: Collection[str], heads: Collection[str]) -> None:
    alike = [name for name in modules if name.endswith(tuple(heads))]
    if alike:
        warnings.warn(
            f"PEFT 0.21 cannot load this adapter: it takes {alike[0]!r}, which has LoRA, for one of modules_to_save, "
            f"{heads}, because the names end alike. dynrank loads and merges it; to train one for PEFT, put "
            f"{alike[0]!r} into modules_to_save, too",
            stacklevel=4,
        )
    names = _TAKEN_FOR_EXPERTS.get(stacked_as(model), ())
    misread = [name for name in modules if name.rpartition(".")[2] in names]
    if misread:
        warnings.warn(
            f"PEFT 0.21 cannot use this adapter: in a {type(model).__name__} it takes {misread[0]!r} and "
            f"{len(misread) - 1} other layers for experts. dynrank loads and merges it; to train one for PEFT, leave "
            f"{', '.join(names)} out of target_modules",
            stacklevel=4,
        )


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    broken = [name for name, value in tensors.items() if not finite(value)]
    if broken:
        raise DivergedError(
            f"{broken[0]!r} and {len(broken) - 1} other tensors of the adapter hold NaN, inf or a number too large for "
            "float32: the training has diverged; lower lr",
            "lr",
        )


def target_modules(model: nn.Module, layers: Collection[str]) -> list[str] | str:
    """Names of the adapted modules; one exact expression if a name would match other modules in PEFT, too."""
    inside = tuple(f"{name}." for name in layers)
    others = [name for name, _ in named_modules(model) if name not in layers and not name.startswith(inside)]
    if any(other.endswith(f".{name}") for other in others for name in layers):
        return "|".join(re.escape(name) for name in layers)
    return list(layers)


def _to_peft(layer: LoRALayer) -> dict[str, Tensor]:
    lora_A = layer.lora_A
    lora_B = layer.lora_B
    if isinstance(layer, LoRAEmbedding):
        return {"lora_embedding_A": lora_A, "lora_embedding_B": lora_B}
    if isinstance(layer, LoRAConv2d):
        filters = lora_A.view(len(lora_A), *layer.weight.shape[1:])
        return {"lora_A.weight": filters, "lora_B.weight": lora_B[:, :, None, None]}
    return {"lora_A.weight": lora_A, "lora_B.weight": lora_B}


def trained_heads(model: nn.Module, layers: Mapping[str, LoRALayer]) -> list[str]:
    """Modules outside the LoRA layers that directly own a trainable parameter, without those inside of another."""
    inside = {id(module) for layer in layers.values() for module in layer.modules()}
    heads = [
        name
        for name, module in named_modules(model)
        if id(module) not in inside and any(p.requires_grad for p in module.parameters(recurse=False))
    ]
    return [name for name in heads if not any(name.startswith(f"{head}.") for head in heads)]
