"""Saving adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import copy
import os
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dynrank.adapters.folder import CONFIG_FILE
from dynrank.adapters.precision import Rounded, Rounding, check_file_dtype, head_in, in_dtype, rounding
from dynrank.adapters.read import WEIGHTS_FILE, open_adapter, wrapper_names
from dynrank.adapters.write import rewrite_adapter, write_adapter
from dynrank.distributed.sharding import plain_class
from dynrank.errors import ConfigurationError, DivergedError
from dynrank.layers.compiled import named_modules, plain_name, uncompiled
from dynrank.layers.experts import LoRAParameter
from dynrank.layers.finding import own_layers
from dynrank.layers.foreign import class_if_imported, stored_on
from dynrank.layers.kinds import LoRAConv2d, LoRAEmbedding
from dynrank.layers.lora_layer import LoRALayer
from dynrank.layers.padded import live_values
from dynrank.layers.peft_layers import peft_layers
from dynrank.layers.vocabulary import extended_embeddings
from dynrank.linalg import finite
from dynrank.patterns import PREFIX, peft_ranks
from dynrank.private import source_of, stacked_as

# The names that PEFT takes for experts in checkpoints of transformers 4, by the family that others are stacked as.
_TAKEN_FOR_EXPERTS = {"mixtral": ("w1", "w2", "w3"), "qwen2_moe": ("gate_proj", "up_proj", "down_proj")}


def save_adapter(model: nn.Module, path: str | Path, *, dtype: torch.dtype | None = None) -> Rounding | None:
    """Write the LoRA layers of ``model``, and its other trainable parts (a head), as a PEFT adapter.

    Embeddings of a transformers model that tokens were added to (``resize_token_embeddings``) are written, too, as by
    PEFT. Each layer keeps its own rank. For a server that reads only one rank for all, see
    :func:`dynrank.export_adapter`. Each file is complete or absent, even after a crash. Only one process may write to a
    folder at a time.

    Args:
        model: a model with LoRA layers, compiled or not. Modules outside them that have parameters with requires_grad
            are saved whole (PEFT's ``modules_to_save``), with their buffers; a BatchNorm whose running statistics move
            belongs to them. If PEFT's get_peft_model or inject_adapter_in_model has returned the model, its active
            adapter is saved as PEFT would.
        path: folder to write to; made if missing.
        dtype: torch.float32, torch.bfloat16 or torch.float8_e4m3fn; None: as in the model. PEFT loads all three. In
            float8 the factors of a layer are balanced and multiplied by a power of two, which its alpha undoes, and
            heads are in bfloat16. dynrank undoes both when it reads; PEFT trains on with smaller steps of the update.

    Returns:
        How far the stored updates are from the model's; None without a ``dtype``.

    Raises:
        ConfigurationError: if the model has no LoRA layers, a weight or bias under one of them is trained, or a value
            is not finite in float32.
        OSError: if the files cannot be written; earlier files are kept.

    >>> import tempfile, torch, dynrank
    >>> folder = tempfile.mkdtemp()
    >>> dynrank.save_adapter(dynrank.add_lora(torch.nn.Sequential(torch.nn.Linear(8, 8)), rank=4), folder)
    >>> {name: layer.rank for name, layer in dynrank.read_adapter(folder).layers.items()}
    {'0': 4}
    """
    check_file_dtype(dtype)
    model = uncompiled(model)
    with live_values(model):
        if theirs := peft_layers(model):
            return _save_peft(model, next(iter(theirs.values())).adapter, Path(path), dtype)
        return _save_own(model, Path(path), dtype)


def _save_own(model: nn.Module, folder: Path, dtype: torch.dtype | None) -> Rounding | None:
    """Write dynrank's layers and the heads of ``model``."""
    layers = own_layers(model)
    if not layers:
        raise ConfigurationError("the model has no LoRA layers to save; call dynrank.add_lora first")
    of_parameters = [name for name, layer in layers.items() if isinstance(layer, LoRAParameter)]
    places = wrapper_names(of_parameters)
    heads = trained_heads(model, layers)
    whole = dict[str, Tensor]()
    for head in heads:
        values = model.get_submodule(head).state_dict()
        whole |= {plain_name(f"{head}.{key}"): value for key, value in values.items()}
    embeddings = _extended(model)
    factors = {f"{name}.{key}": value for name, of in layers.items() for key, value in _to_peft(of, of).items()}
    _check_finite(factors | whole | embeddings)
    stored = {} if dtype is None else _stored(layers, dtype)
    tensors = {
        f"{places.get(name, name)}.{key}": value
        for name, layer in layers.items()
        for key, value in _to_peft(layer, stored.get(name, layer)).items()
    }
    tensors |= embeddings | {name: value if dtype is None else head_in(value, dtype) for name, value in whole.items()}
    powers = {name: new.power for name, new in stored.items() if new.power}
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
        **peft_ranks({name: (of.rank, of.alpha * 4.0 ** -powers.get(name, 0)) for name, of in layers.items()}),
        # Beside target_parameters PEFT refuses any other dropout.
        "lora_dropout": 0.0 if of_parameters else max(layer.dropout.p for layer in layers.values()),
        "target_modules": target_modules(model, [name for name in layers if name not in places]),
        "target_parameters": of_parameters or None,
        "modules_to_save": heads or None,
        "bias": "none",
    }
    _warn_of_misread(model, [name for name in layers if name not in places], heads)
    own = {PREFIX + name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    write_adapter(folder, own, config, powers)
    return rounding({name: (new, layers[name].scaling) for name, new in stored.items()}) if stored else None


def _extended(model: nn.Module) -> dict[str, Tensor]:
    """{name in PEFT: weight or bias of an embedding that tokens were added to}."""
    extended = extended_embeddings(model)
    found = dict[str, Tensor]()
    for name, module in named_modules(model):
        if any(module is embedding for embedding in extended):
            if isinstance(module, LoRALayer):
                module = module.base
                name = f"{name}.base_layer"
            found |= {f"{name}.{leaf}": value for leaf, value in module.named_parameters(recurse=False)}
    sharded = class_if_imported("torch.distributed.tensor.DTensor")
    absent = [name for name, value in found.items() if value.is_meta or isinstance(value, sharded)]
    if absent:
        warnings.warn(
            f"tokens were added to {absent[0]!r}, and this process has not all of its values (they are sharded or "
            "offloaded): the adapter is saved without it, so load it into a base with the same rows",
            stacklevel=4,
        )
    return {name: value for name, value in found.items() if name not in absent}


def _save_peft(model: nn.Module, adapter: str, folder: Path, dtype: torch.dtype | None) -> Rounding | None:
    """Write this adapter of PEFT's ``model``."""
    if not isinstance(getattr(model, "peft_config", None), dict):
        raise ConfigurationError(
            "model must be what PEFT's get_peft_model or inject_adapter_in_model returned, got a "
            f"{type(model).__name__} that contains it; pass PEFT's model to save_adapter"
        )
    _check_finite({name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad})
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as place:
        _write_by_peft(model, adapter, Path(place))
        if dtype is not None:
            return _written_again(next(Path(place).rglob(CONFIG_FILE)).parent, folder, dtype)
        # PEFT writes an adapter that is not named "default" to a folder of its name.
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            (written,) = Path(place).rglob(name)
            written.chmod(folder.stat().st_mode & 0o666)
            os.replace(written, folder / name)
    return None


def _write_by_peft(model: Any, adapter: str, folder: Path) -> None:
    """Write the adapter as PEFT does; the files of a model without PEFT's wrapper have the names of one with it."""
    # Importing peft takes a second, and only models of PEFT need it, whose user has imported it already.
    from peft import PeftModel, get_peft_model_state_dict

    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder), selected_adapters=[adapter])
        return
    values = get_peft_model_state_dict(model, adapter_name=adapter)
    own = {PREFIX + name: value.detach().cpu().clone().contiguous() for name, value in values.items()}
    save_file(own, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = copy.copy(model.peft_config[adapter])
    config.inference_mode = True
    config.base_model_name_or_path = config.base_model_name_or_path or source_of(model) or None
    config.save_pretrained(str(folder))


def _written_again(source: Path, folder: Path, dtype: torch.dtype) -> Rounding | None:
    """Write the adapter in ``source`` to ``folder`` in ``dtype``."""
    with open_adapter(source) as adapter:
        factors = {name: (*adapter.factors(name)[::-1], layer.scaling) for name, layer in adapter.layers.items()}
        return rewrite_adapter(folder, adapter, factors, dtype)


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
            f"PEFT 0.21 cannot use this adapter: in a {type(model).__name__} it takes {len(misread)} of {len(modules)} "
            f"layers, {misread[0]!r} first, for experts. dynrank loads and merges it; to train one for PEFT, leave "
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


def _stored(layers: Mapping[str, LoRALayer], dtype: torch.dtype) -> dict[str, Rounded]:
    """{layer: its factors in ``dtype``}."""
    return {
        name: in_dtype(layer.lora_B.detach().cpu(), layer.lora_A.detach().cpu(), dtype, layer.num_products)
        for name, layer in layers.items()
    }


def _to_peft(layer: LoRALayer, factors: LoRALayer | Rounded) -> dict[str, Tensor]:
    """{last part of a key: one of the factors, as PEFT has it for such a layer}."""
    lora_A = factors.lora_A
    lora_B = factors.lora_B
    if isinstance(layer, LoRAEmbedding):
        return {"lora_embedding_A": lora_A, "lora_embedding_B": lora_B}
    if isinstance(layer, LoRAConv2d):
        filters = lora_A.view(len(lora_A), *layer.weight.shape[1:])
        return {"lora_A.weight": filters, "lora_B.weight": lora_B[:, :, None, None]}
    return {"lora_A.weight": lora_A, "lora_B.weight": lora_B}


def trained_heads(model: nn.Module, layers: Mapping[str, LoRALayer]) -> list[str]:
    """Modules outside the LoRA layers that directly own a trainable parameter, without those inside of another.

    Refuses what PEFT's format cannot store: a trained parameter beside LoRA layers, or under one.
    """
    lost = dict[str, None]()
    for name, layer in layers.items():
        # A bare parameter with LoRA has its owner's name, and so have the parameters beside it.
        owner = name.rpartition(".")[0] if isinstance(layer, LoRAParameter) else name
        lost |= dict.fromkeys(f"{owner}.{leaf}" for leaf in layer.trained_in_base())
    if lost:
        raise ConfigurationError(
            f"{next(iter(lost))!r} and {len(lost) - 1} other parameters of layers with LoRA are trained, and an "
            "adapter cannot store them; freeze them before training, leave the layers out of target_modules, or save "
            "the state_dict"
        )
    inside = {id(module) for layer in layers.values() for module in layer.modules()}
    heads = [
        name
        for name, module in named_modules(model)
        if id(module) not in inside and any(p.requires_grad for p in module.parameters(recurse=False))
    ]
    for head in heads:
        if any(name.startswith(f"{head}." if head else "") for name in layers):
            raise ConfigurationError(
                f"{head or 'the model'!r} has LoRA layers and a trainable parameter of its own, which PEFT's format "
                "cannot store; freeze the parameter before save_adapter, or save it yourself"
            )
    return [name for name in heads if not any(name.startswith(f"{head}.") for head in heads)]
