"""An adapter in memory, held against a model: every fault found and every layer made before anything changes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dynrank.adapters.config import alpha_of, read_config
from dynrank.adapters.stored import sort_keys, weights_path
from dynrank.adapters.tensor_file import FLOATS
from dynrank.errors import ConfigurationError
from dynrank.layers.base import LoRALayer, initial_scaling
from dynrank.layers.compiled import compiled_alone, uncompiled
from dynrank.layers.finding import own_layers, plain_modules, tied_weights
from dynrank.layers.kinds import layer_class
from dynrank.layers.placing import base_values, make_layer, place_layers

__all__ = ["Adapter", "AdapterChange", "read_adapter"]


@dataclass(frozen=True)
class Adapter:
    """A PEFT LoRA adapter in memory, not yet held against a model.

    Attributes:
        source: the folder that it was read from.
        config: adapter_config.json, checked.
        factors: layer -> {"A": lora_A, "B": lora_B}, as stored.
        others: name in the model -> tensor, of everything else (modules_to_save).
    """

    source: str
    config: Mapping[str, Any]
    factors: Mapping[str, Mapping[str, Tensor]]
    others: Mapping[str, Tensor]


def read_adapter(path: str | Path) -> Adapter:
    """Read a PEFT adapter (ours or PEFT's) from its folder into memory, for :func:`swap_adapter`.

    Raises:
        ConfigurationError: if a file is missing, broken or not a LoRA adapter, or uses a variant with other arithmetic.
    """
    folder = Path(path)
    config, file = read_config(folder), weights_path(folder)
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (a safe_open is no mapping)
    except (SafetensorError, OSError) as error:
        raise ConfigurationError(f"{str(file)!r} is not a whole safetensors file: {error}") from None
    factors, others = sort_keys(tensors, folder)
    return Adapter(
        source=str(folder),
        config=config,
        factors={layer: {factor: tensors[key] for factor, key in pair.items()} for layer, pair in factors.items()},
        others={name: tensors[key] for name, key in others.items()},
    )


class AdapterChange:
    """What an adapter puts into a model, complete but not yet there.

    Args:
        model: plain, or with LoRA layers, which the adapter's replace.
        adapter: to put there.
        dtype: of the factors.

    Raises:
        ConfigurationError: if the adapter does not fit the model (all faults are listed).
    """

    def __init__(self, model: nn.Module, adapter: Adapter, dtype: torch.dtype) -> None:
        self._model = model = uncompiled(model)
        named = list(plain_modules(model))
        first_names: dict[int, str] = {}
        for name, module in named:
            first_names.setdefault(id(module), name)
        modules = {name: module for name, module in named if first_names[id(module)] == name}
        alone = compiled_alone(model)
        pairs, faults = (
            {},
            [
                f"{name!r} was compiled by itself (torch.compile), which cannot follow; compile the whole model"
                for name, module in [*named, *own_layers(model).items()]
                if id(module) in alone and (name in adapter.factors or isinstance(module, LoRALayer))
            ],
        )
        for name, pair in adapter.factors.items():
            fault = _layer_fault(name, pair, modules.get(name))
            if fault:
                faults.append(fault)
            else:
                pairs[name] = pair
        self._places = {
            f"{name}.{leaf}" if name else leaf: (module, leaf)
            for name, module in named
            for leaf, value in [*module._parameters.items(), *module._buffers.items()]
            if value is not None
        }
        heads, found = self._fitting_heads(adapter)
        faults += found
        if faults:
            raise ConfigurationError(
                f"the adapter {adapter.source!r} does not fit the model (task.model):\n  " + "\n  ".join(faults[:20])
            )
        self._layers = {name: _made(name, modules[name], pair, adapter, dtype) for name, pair in pairs.items()}
        self._heads = []
        for name, value in heads.items():
            module, leaf = self._places[name]
            old = _value(module, leaf)
            self._heads.append((module, leaf, value.to(old.device, old.dtype, copy=True)))

    def make(self, *, keep_base: bool, group: bool | None = None) -> None:
        """Put the layers and heads into the model, and take out those of the adapter before.

        Args:
            keep_base: keep the base's own values of a head that is overwritten, so that it can get them back.
            group: as for :func:`dynrank.layers.placing.place_layers`.
        """
        place_layers(self._model, self._layers, group=group)
        overwritten = {(id(module), leaf) for module, leaf, _ in self._heads}
        for module, leaf in self._places.values():
            if leaf in base_values(module) and (id(module), leaf) not in overwritten:
                value = base_values(module).pop(leaf)
                assert value is not None  # or the adapter would not have fitted
                _put(module, leaf, value.requires_grad_(False))
        for module, leaf, value in self._heads:
            base_values(module, note=True).setdefault(leaf, _value(module, leaf) if keep_base else None)
            _put(module, leaf, value)
            module.requires_grad_(True)

    def _fitting_heads(self, adapter: Adapter) -> tuple[dict[str, Tensor], list[str]]:
        """(tensors of modules_to_save by parameter name, faults); a base weight stored along must equal the model's."""
        saved = list(adapter.config.get("modules_to_save") or [])
        tied = tied_weights(self._model)
        heads, faults = {}, []
        for name, value in adapter.others.items():
            owner, _, leaf = name.rpartition(".")
            plain, target = owner.removesuffix(".base_layer"), name
            if plain != owner and plain in adapter.factors:
                target = f"{plain}.{leaf}"
            if target not in self._places:
                faults.append(f"the model has no parameter {target!r}")
                continue
            current, whole = _value(*self._places[target]), any(_is_part(owner, module) for module in saved)
            if value.is_floating_point() != current.is_floating_point() or (
                value.is_floating_point() and value.dtype not in FLOATS.values()
            ):
                faults.append(f"{target!r} is {current.dtype} in the model and {value.dtype} in the adapter")
            elif id(current) in tied and whole:
                faults.append(
                    f"{target!r} is tied to another weight in the model, and a copy of its own in the adapter"
                )
            elif whole and owner in adapter.factors:
                faults.append(f"{owner!r} is both adapted and saved whole in the adapter")
            elif not torch.isfinite(value).all():
                faults.append(f"{target!r} holds NaN or inf in the adapter")
            elif current.shape != value.shape:
                faults.append(f"{target!r} is {[*current.shape]} in the model and {[*value.shape]} in the adapter")
            elif whole:
                heads[target] = value
            elif not torch.equal(current.cpu().to(value.dtype), value):
                faults.append(
                    f"{target!r} of the base model has other values in the adapter: it was trained on another base"
                )
        overwritten = [self._places[name] for name in heads]
        faults += [
            f"{name!r} was trained whole with the adapter in the model, this one has no values for it, and the base's "
            "own are gone; load it into the plain model"
            for name, (module, leaf) in self._places.items()
            if (module, leaf) not in overwritten and base_values(module).get(leaf, module) is None
        ]
        return heads, faults


def _made(name: str, base: nn.Module, pair: Mapping[str, Tensor], adapter: Adapter, dtype: torch.dtype) -> LoRALayer:
    lora_A, lora_B = _matrices(pair)
    config = adapter.config
    scaling = initial_scaling(alpha_of(config, name), pair["A"].shape[0], bool(config.get("use_rslora")))
    dropout = config.get("lora_dropout") or 0.0
    factors = lora_A, lora_B
    return make_layer(base, rank=len(lora_A), scaling=scaling, dropout=dropout, dtype=dtype, factors=factors)


def _matrices(pair: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The factors as matrices, without padding beyond the highest rank that their product can have."""
    lora_A, lora_B = pair["A"].flatten(1), pair["B"].flatten(1)
    most = min(lora_A.shape[1], lora_B.shape[0])
    if lora_A.shape[0] == lora_B.shape[1] and not (lora_A[most:].any() or lora_B[:, most:].any()):
        return lora_A[:most], lora_B[:, :most]
    return lora_A, lora_B


def _layer_fault(name: str, pair: Mapping[str, Tensor], base: nn.Module | None) -> str | None:
    if base is None:
        return f"the model has no module {name!r}"
    cls = layer_class(base)
    if cls is None:
        return f"{name!r} is a {type(base).__name__}, which cannot have LoRA"
    if set(pair) != {"A", "B"} or pair["A"].ndim < 2 or pair["B"].ndim < 2:
        return f"{name!r} lacks two factors of two dimensions or more"
    for factor in pair.values():
        if factor.dtype not in FLOATS.values():
            return f"{name!r} must have factors of {[*FLOATS]}, got {factor.dtype}"
    (d_out, d_in), (lora_A, lora_B) = cls.shape_of(base), _matrices(pair)
    rank = lora_A.shape[0]
    if lora_A.shape != (rank, d_in) or lora_B.shape != (d_out, rank) or not 1 <= rank <= min(d_out, d_in):
        return f"{name!r} is a ({d_out}, {d_in}) layer, its factors are {[*lora_A.shape]} and {[*lora_B.shape]}"
    if not (torch.isfinite(lora_A).all() and torch.isfinite(lora_B).all()):
        return f"{name!r} holds NaN or inf"
    return None


def _is_part(module: str, saved: str) -> bool:
    return re.search(rf"(^|\.){re.escape(saved)}(\.|$)", module) is not None


def _value(module: nn.Module, leaf: str) -> Tensor:
    value: Tensor = getattr(module, leaf)
    return value


def _put(module: nn.Module, leaf: str, value: Tensor) -> None:
    """Another tensor object in the place: what reads the old one, on whatever stream, goes on reading it."""
    if leaf in module._parameters and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value)
    setattr(module, leaf, value)
