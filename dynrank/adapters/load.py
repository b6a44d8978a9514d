"""Loading adapters from disk into a model, even while it is in use: all is checked before anything changes."""

from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from dynrank.adapters.call_lock import call_lock_of
from dynrank.adapters.read import Adapter, read_adapter
from dynrank.adapters.stored import FLOATS
from dynrank.errors import ConfigurationError
from dynrank.layers.base import LoRALayer
from dynrank.layers.compiled import compiled_alone, uncompiled
from dynrank.layers.finding import modules_by_name, own_layers, plain_modules, tied_weights
from dynrank.layers.kinds import layer_class
from dynrank.layers.peft_layers import refuse_peft
from dynrank.layers.placing import base_values, make_layer, place_layers
from dynrank.output.console import shape_of_update

M = TypeVar("M", bound=nn.Module)
# A module, and the name of a parameter or buffer in it.
Place = tuple[nn.Module, str]


def load_adapter(model: M, path: str | Path | Adapter, *, dtype: torch.dtype = torch.float32) -> M:
    """Put the LoRA layers of a PEFT adapter (ours or PEFT's) into a plain model, in place, and load them.

    Ranks and scaling come from the settings by PEFT's rules. Everything is checked before the model changes.

    Args:
        model: the model that the adapter was trained on, without LoRA layers.
        path: folder with adapter_config.json and adapter_model.safetensors, or what :func:`read_adapter` returned.
        dtype: dtype of the factors.

    Returns:
        ``model`` itself; adapters and saved heads are trainable, all else is frozen.

    Raises:
        ConfigurationError: if a file is missing, broken or not a LoRA adapter, uses a variant with another formula, or
            does not fit the model.
    """
    refuse_peft(model, "load_adapter", "call its load_adapter(), or pass the plain model")
    if own_layers(model):
        raise ConfigurationError(
            "the model has LoRA layers already; replace them with dynrank.swap_adapter, merge them (dynrank.merge) or "
            "load a plain model"
        )
    change = _Change(model, path, dtype)
    with call_lock_of(model).closed():
        change.put(keep_base=False)
    return model


def swap_adapter(model: M, adapter: str | Path | Adapter, *, dtype: torch.dtype = torch.float32) -> M:
    """Replace the adapter of a model, if it has one, by this adapter; the model may be in use in other threads.

    Ranks, scaling and adapted layers may all differ: a layer that the new adapter does not name becomes its base layer
    again. All new layers are made first. They are exchanged when no thread is in a call of the model or its
    ``generate``, so each forward and each generated text uses only one of the adapters. The swap waits for running
    calls, and calls that begin later wait for the swap. If a call waits for another thread to call the same model, both
    wait forever.

    The first ``load_adapter`` or ``swap_adapter`` of a model begins to count calls: if a model gets its first adapter
    by a swap, a call that is running then may see both states. :func:`dynrank.adapters.call_lock.call_lock_of` says
    which other calls are not counted, and protects your own loops of several calls.

    The layers are new objects with new parameters. To continue training, make a new optimizer and a new RankScheduler;
    compiled code is compiled again. No backward pass may be running.

    Args:
        model: the model that the adapter was trained on, or what ``torch.compile(model)`` returned.
        adapter: a folder with adapter_config.json and adapter_model.safetensors, or what :func:`read_adapter` returned.
        dtype: dtype of the factors.

    Returns:
        ``model`` itself; adapters and saved heads are trainable, all else is frozen.

    Raises:
        ConfigurationError: as :func:`load_adapter`, or if a part that was trained whole would keep the previous
            adapter's values; nothing has changed then.
        RuntimeError: if this is called inside the model's own forward or generate.
    """
    refuse_peft(model, "swap_adapter", "call its load_adapter() and set_adapter()")
    change = _Change(model, adapter, dtype)
    with call_lock_of(model).closed():
        change.put(keep_base=True)
    return model


class _Change:
    """The layers and heads of an adapter, made for a model but not yet in it; they will replace LoRA layers in it."""

    def __init__(self, model: nn.Module, source: str | Path | Adapter, dtype: torch.dtype) -> None:
        adapter = source if isinstance(source, Adapter) else read_adapter(source)
        self._model = uncompiled(model)
        named = list(plain_modules(self._model))
        self._places: dict[str, Place] = {
            f"{name}.{leaf}" if name else leaf: (module, leaf)
            for name, module in named
            for leaf, value in [*module._parameters.items(), *module._buffers.items()]
            if value is not None
        }
        alone = compiled_alone(self._model)
        faults = [
            f"{name!r} was compiled by itself (torch.compile), so it cannot change; compile the whole model"
            for name, module in [*named, *own_layers(self._model).items()]
            if id(module) in alone and (name in adapter.layers or isinstance(module, LoRALayer))
        ]
        bases, found = self._fitting_bases(adapter)
        self._heads, found_in_heads = self._fitting_heads(adapter)
        faults += found + found_in_heads + self._lost_values()
        if faults:
            raise ConfigurationError(
                f"the adapter {adapter.source!r} does not fit the model (task.model):\n  " + "\n  ".join(faults[:20])
            )
        self._layers = {}
        for name, base in bases.items():
            stored, (lora_B, lora_A) = adapter.layers[name], adapter.factors(name)
            options = {"scaling": stored.scaling, "dropout": adapter.config.lora_dropout or 0.0, "dtype": dtype}
            self._layers[name] = make_layer(base, rank=stored.rank, factors=(lora_A, lora_B), **options)

    def put(self, *, keep_base: bool) -> None:
        """Put the layers and heads into the model, and remove those of the previous adapter.

        With ``keep_base`` the base's own values of overwritten heads are kept, so that a later swap can restore them.
        """
        place_layers(self._model, self._layers)
        for module, leaf in self._not_overwritten().values():
            if leaf in base_values(module):
                value = base_values(module).pop(leaf)
                # _lost_values() has refused the adapter if there is no value.
                assert value is not None
                _put(module, leaf, value.requires_grad_(False))
        for name, value in self._heads.items():
            module, leaf = self._places[name]
            base_values(module).setdefault(leaf, _value(module, leaf) if keep_base else None)
            _put(module, leaf, value)
            module.requires_grad_(True)

    def _fitting_bases(self, adapter: Adapter) -> tuple[dict[str, nn.Module], list[str]]:
        """({layer of the adapter: its module}, faults)."""
        modules, bases, faults = modules_by_name(self._model), {}, []
        for name, stored in adapter.layers.items():
            base = modules.get(name)
            kind = layer_class(base) if base is not None else None
            if base is None:
                faults.append(f"the model has no module {name!r}")
            elif kind is None:
                faults.append(f"{name!r} is a {type(base).__name__}, which cannot have LoRA")
            elif (ours := (kind.num_products_of(base), *kind.shape_of(base))) != (stored.experts, *stored.shape):
                theirs = shape_of_update(stored.experts, *stored.shape)
                faults.append(f"{name!r} is {shape_of_update(*ours)} in the model and {theirs} in the adapter")
            else:
                # This raises if factors are not finite, before a layer that is made freezes its base.
                adapter.factors(name)
                bases[name] = base
        return bases, faults

    def _fitting_heads(self, adapter: Adapter) -> tuple[dict[str, Tensor], list[str]]:
        """({name: tensor of modules_to_save, in the model's dtype and on its device}, faults).

        If PEFT has also stored a weight of the base, it must equal the model's.
        """
        tied = tied_weights(self._model)
        heads, faults = {}, []
        for name, key in adapter.others.items():
            owner, _, leaf = name.rpartition(".")
            adapted = owner.removesuffix(".base_layer")
            target = f"{adapted}.{leaf}" if adapted != owner and adapted in adapter.layers else name
            if target not in self._places:
                faults.append(f"the model has no parameter {target!r}")
                continue
            value, current = adapter.tensor(key), _value(*self._places[target])
            whole = any(f".{module}." in f".{owner}." for module in adapter.config.modules_to_save or ())
            if value.is_floating_point() != current.is_floating_point() or (
                value.is_floating_point() and value.dtype not in FLOATS.values()
            ):
                faults.append(f"{target!r} is {current.dtype} in the model and {value.dtype} in the adapter")
            elif id(current) in tied and whole:
                faults.append(
                    f"{target!r} is tied to another weight in the model, but is a separate copy in the adapter"
                )
            elif whole and owner in adapter.layers:
                faults.append(f"{owner!r} is both adapted and saved whole in the adapter")
            elif not torch.isfinite(value).all():
                faults.append(f"{target!r} holds NaN or inf in the adapter")
            elif current.shape != value.shape:
                faults.append(f"{target!r} is {[*current.shape]} in the model and {[*value.shape]} in the adapter")
            elif whole:
                heads[target] = value.to(current.device, current.dtype, copy=True)
            elif not torch.equal(current.cpu().to(value.dtype), value):
                faults.append(
                    f"{target!r} of the base model has other values in the adapter: it was trained on another base"
                )
        return heads, faults

    def _not_overwritten(self) -> dict[str, Place]:
        overwritten = {self._places[name] for name in self._heads}
        return {name: place for name, place in self._places.items() if place not in overwritten}

    def _lost_values(self) -> list[str]:
        return [
            f"{name!r} was trained whole with the model's present adapter; the new adapter has no values for it, and "
            "the base's values were not kept; load the adapter into the plain model"
            for name, (module, leaf) in self._not_overwritten().items()
            if base_values(module).get(leaf, module) is None
        ]


def _value(module: nn.Module, leaf: str) -> Tensor:
    value: Tensor = getattr(module, leaf)
    return value


def _put(module: nn.Module, leaf: str, value: Tensor) -> None:
    """Put a new tensor object there: code that still reads the old one, on any stream, is not disturbed."""
    if leaf in module._parameters and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value)
    setattr(module, leaf, value)
