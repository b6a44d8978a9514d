"""Loading adapters from disk into a model: all is checked before anything changes."""

from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from dynrank.adapters.base import BASE_FILE, other_weights
from dynrank.adapters.read import Adapter, read_adapter
from dynrank.adapters.sidecar_files import label_names, stored_labels
from dynrank.adapters.stored import FLOATS, StoredLayer, refuse_faults
from dynrank.errors import ConfigurationError
from dynrank.layers.compiled import compiled_alone, uncompiled
from dynrank.layers.finding import modules_by_name, own_layers, own_tensors, plain_modules
from dynrank.layers.kinds import OFFLOADED, is_offloaded, layer_class
from dynrank.layers.lora_layer import LoRALayer
from dynrank.layers.peft_layers import refuse_peft
from dynrank.layers.placing import check_dtype, make_layer, place_layers, trained_whole
from dynrank.layers.vocabulary import token_embeddings
from dynrank.output.console import shape_of_update

M = TypeVar("M", bound=nn.Module)
# {name of a parameter or buffer: (its module, its name in the module)}.
Places = dict[str, tuple[nn.Module, str]]


def load_adapter(model: M, path: str | Path | Adapter, *, dtype: torch.dtype = torch.float32) -> M:
    """Put the LoRA layers of a PEFT adapter (ours or PEFT's) into a plain model, in place, and load them.

    Ranks and scaling come from the settings by PEFT's rules. Everything is checked before the model changes, also the
    weights of the base if the folder has ``base.json``, as those of a run have. Of a base that tokens were added to,
    the adapter has the rows of these; call the model's ``resize_token_embeddings`` first.

    Args:
        model: the model that the adapter was trained on, without LoRA layers.
        path: folder with adapter_config.json and adapter_model.safetensors, or what :func:`read_adapter` returned.
        dtype: dtype of the factors.

    Returns:
        ``model`` itself; adapters and saved heads are trainable, all else is frozen.

    Raises:
        ConfigurationError: if a file is missing, broken or not a LoRA adapter, uses a variant with another formula, or
            does not fit the model.

    >>> import tempfile, torch, dynrank
    >>> folder = tempfile.mkdtemp()
    >>> dynrank.save_adapter(dynrank.add_lora(torch.nn.Sequential(torch.nn.Linear(8, 8)), rank=4), folder)
    >>> model = dynrank.load_adapter(torch.nn.Sequential(torch.nn.Linear(8, 8)), folder)
    >>> [layer.rank for _, layer in dynrank.lora_layers(model)]
    [4]
    """
    refuse_peft(model, "load_adapter", "call its load_adapter(), or pass the plain model")
    if own_layers(model):
        raise ConfigurationError(
            "the model has LoRA layers already; replace them with dynrank.swap_adapter, merge them (dynrank.merge) or "
            "load a plain model",
            "model",
        )
    _put(model, path, dtype)
    return model


def swap_adapter(model: M, adapter: str | Path | Adapter, *, dtype: torch.dtype = torch.float32) -> M:
    """Replace the adapter of a model, if it has one, by this adapter, between two requests to a live model.

    No forward, ``generate`` or backward of the model may run meanwhile, in any thread.

    Ranks, scaling and adapted layers may all differ: a layer that the new adapter does not name becomes its base layer
    again. All new layers are made before the first one is exchanged. They are new objects with new parameters: to
    continue training, make a new optimizer and a new RankScheduler; compiled code is compiled again.

    Args:
        model: the model that the adapter was trained on, or what ``torch.compile(model)`` returned.
        adapter: a folder with adapter_config.json and adapter_model.safetensors, or what :func:`read_adapter` returned.
        dtype: dtype of the factors.

    Returns:
        ``model`` itself; adapters and saved heads are trainable, all else is frozen.

    Raises:
        ConfigurationError: as :func:`load_adapter`, or if a part that was trained whole (modules_to_save) would keep
            the previous adapter's values; nothing has changed then.

    >>> import tempfile, torch, dynrank
    >>> folder = tempfile.mkdtemp()
    >>> dynrank.save_adapter(dynrank.add_lora(torch.nn.Sequential(torch.nn.Linear(8, 8)), rank=2), folder)
    >>> model = dynrank.add_lora(torch.nn.Sequential(torch.nn.Linear(8, 8)), rank=4)
    >>> [layer.rank for _, layer in dynrank.lora_layers(dynrank.swap_adapter(model, folder))]
    [2]
    """
    refuse_peft(model, "swap_adapter", "call its load_adapter() and set_adapter()")
    _put(model, adapter, dtype)
    return model


def start_from(model: nn.Module, adapter: Adapter) -> None:
    """Give the LoRA layers and heads of ``model`` the values of ``adapter``, from which training goes on.

    The layers have the adapter's names and ranks already, and the heads train already (``modules_to_save``). Everything
    is checked before the model changes.
    """
    layers = own_layers(model)
    places = _places(model)
    _, faults = _fitting_bases(model, adapter)
    heads, embeddings, faults_of_others = _fitting_others(model, adapter, places)
    faults += faults_of_others
    trained = {name for name, (module, leaf) in places.items() if leaf in trained_whole(module)}
    faults += [
        f"{name!r} is stored whole in the adapter, and the task does not train it" for name in heads.keys() - trained
    ]
    absent = trained - heads.keys() - adapter.others.keys()
    faults += [f"{name!r} is trained by the task, and the adapter has no values for it" for name in sorted(absent)]
    folder = Path(adapter.source)
    faults += _other_base(model, adapter)
    labels = stored_labels(folder)
    if labels and labels != label_names(model):
        faults.append(f"its labels are {labels[:9]}, those of the task {label_names(model)[:9]}")
    refuse_faults(f"the adapter {adapter.source!r} does not fit the task", faults, "folder")
    for name, layer in layers.items():
        lora_B, lora_A = adapter.factors(name)
        # A file may hold fewer bits than training needs.
        layer.set_factors(lora_A.to(layer.lora_A), lora_B.to(layer.lora_B))
        layer.scaling = adapter.layers[name].scaling
    _copy(heads | embeddings, places)


def _put(model: nn.Module, source: str | Path | Adapter, dtype: torch.dtype) -> None:
    """Put the layers and heads of an adapter into ``model``, in place of its LoRA layers, after all checks."""
    check_dtype(dtype)
    adapter = source if isinstance(source, Adapter) else read_adapter(source)
    model = uncompiled(model)
    places = _places(model)
    bases, faults = _fitting_bases(model, adapter)
    heads, embeddings, faults_of_others = _fitting_others(model, adapter, places)
    faults = _compiled_alone(model, adapter) + faults + faults_of_others + _kept_values(places, heads)
    # Of a model of another architecture, names and shapes say enough.
    faults = faults or _other_base(model, adapter)
    refuse_faults(f"the adapter {adapter.source!r} does not fit the model", faults, "model")
    layers = {}
    for name, base in bases.items():
        stored = adapter.layers[name]
        lora_B, lora_A = adapter.factors(name)
        options = {"scaling": stored.scaling, "dropout": adapter.config.lora_dropout or 0.0, "dtype": dtype}
        layers[name] = make_layer(base, rank=stored.rank, factors=(lora_A, lora_B), **options)
    place_layers(model, layers)
    _copy(heads | embeddings, places)
    for name in heads:
        module, leaf = places[name]
        module.requires_grad_(True)
        trained_whole(module).add(leaf)


def _copy(values: dict[str, Tensor], places: Places) -> None:
    for name, value in values.items():
        module, leaf = places[name]
        with torch.no_grad():
            getattr(module, leaf).copy_(value)


def _other_base(model: nn.Module, adapter: Adapter) -> list[str]:
    """What of ``model`` has other weights than the base on which ``adapter`` was trained."""
    folder = Path(adapter.source)
    other = other_weights(model, folder)
    if not other:
        return []
    known = adapter.config.base_model_name_or_path
    name = f" ({known})" if known else ""
    return [
        f"it was trained on another base{name}: {other}; load that base, or remove {str(folder / BASE_FILE)!r} if the "
        "adapter shall go on this one"
    ]


def _places(model: nn.Module) -> Places:
    return {
        f"{name}.{leaf}" if name else leaf: (module, leaf)
        for name, module in plain_modules(model)
        for leaf, _ in own_tensors(module)
    }


def _compiled_alone(model: nn.Module, adapter: Adapter) -> list[str]:
    alone = compiled_alone(model)
    return [
        f"{name!r} was compiled by itself (torch.compile), so it cannot change; compile the whole model"
        for name, module in [*plain_modules(model), *own_layers(model).items()]
        if id(module) in alone and (name in adapter.layers or isinstance(module, LoRALayer))
    ]


def _fitting_bases(model: nn.Module, adapter: Adapter) -> tuple[dict[str, nn.Module], list[str]]:
    """({layer of the adapter: its module}, faults)."""
    modules = modules_by_name(model)
    bases = {}
    faults = []
    for name, stored in adapter.layers.items():
        base = modules.get(name)
        fault = f"the model has no module {name!r}" if base is None else misfit(name, base, stored)
        if fault is not None:
            faults.append(fault)
        elif base is not None:
            # This raises if factors are not finite, before a layer that is made freezes its base.
            adapter.factors(name)
            bases[name] = base
    return bases, faults


def misfit(name: str, base: nn.Module, stored: StoredLayer) -> str | None:
    """Why a stored layer cannot be on the module of its name; None: it can."""
    kind = layer_class(base)
    if kind is None:
        return f"{name!r} is a {type(base).__name__}, which cannot have LoRA"
    if is_offloaded(base):
        return f"{name!r} cannot have LoRA: {OFFLOADED}"
    ours = (kind.num_products_of(base), *kind.shape_of(base))
    if ours == (stored.experts, *stored.shape):
        return None
    theirs = shape_of_update(stored.experts, *stored.shape)
    return f"{name!r} is {shape_of_update(*ours)} in the model and {theirs} in the adapter"


def _fitting_others(
    model: nn.Module, adapter: Adapter, places: Places
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """({name: value of what was trained whole}, {name: embedding of the base with added tokens}, faults).

    A weight of the base that PEFT has also stored must have the model's values, but for added tokens.
    """
    heads = {}
    embeddings = {}
    faults = []
    for name, key in adapter.others.items():
        owner, _, leaf = name.rpartition(".")
        adapted = owner.removesuffix(".base_layer")
        target = f"{adapted}.{leaf}" if adapted != owner and adapted in adapter.layers else name
        if target not in places:
            faults.append(f"the model has no parameter {target!r}")
            continue
        module, _ = places[target]
        value = adapter.tensor(key)
        current = getattr(module, leaf)
        trained = adapter.is_trained(name)
        if value.is_floating_point() != current.is_floating_point() or (
            value.is_floating_point() and value.dtype not in FLOATS.values()
        ):
            faults.append(f"{target!r} is {current.dtype} in the model and {value.dtype} in the adapter")
        elif not torch.isfinite(value).all():
            faults.append(f"{target!r} holds NaN or inf in the adapter")
        elif not _fits_ties(current, value, adapter, places, everywhere=trained):
            faults.append(f"{target!r} is tied to another weight in the model, but is a separate copy in the adapter")
        elif trained and owner in adapter.layers:
            faults.append(f"{owner!r} is both adapted and saved whole in the adapter")
        elif current.shape != value.shape:
            of_tokens = current.shape[1:] == value.shape[1:] and any(module is of for of in token_embeddings(model))
            advice = f"; call resize_token_embeddings({len(value)}) of the model first" if of_tokens else ""
            faults.append(f"{target!r} is {[*current.shape]} in the model and {[*value.shape]} in the adapter{advice}")
        elif trained:
            heads[target] = value
        elif (found := _with_added_rows(current, value)) is not None:
            embeddings[target] = found
        else:
            faults.append(
                f"{target!r} of the base model has other values in the adapter: it was trained on another base, or "
                "this weight was trained and is not in modules_to_save"
            )
    return heads, embeddings, faults


def _with_added_rows(current: Tensor, value: Tensor) -> Tensor | None:
    """The base's ``current`` with those rows of ``value`` that tokens were added for; None: of another base.

    These are the last ones, and fewer than the others. ``resize_token_embeddings`` draws them anew each time.
    """
    own = 0
    # Either of the two may be the other one rounded.
    for dtype in (current.dtype, value.dtype):
        differ = current.cpu().to(dtype) != value.to(dtype)
        if not differ.any():
            return current
        rows = differ[..., None].flatten(1).any(1)
        own = max(own, int(rows.int().argmax()))
    return torch.cat([current[:own], value[own:].to(current)]) if own > len(value) // 2 else None


def _fits_ties(weight: Tensor, value: Tensor, adapter: Adapter, places: Places, *, everywhere: bool) -> bool:
    """Whether the adapter has the same ``value`` by each name of ``weight`` in the model; not tied, it has one name.

    A tied weight that was trained must be there ``everywhere``, by all its names: so :func:`dynrank.save_adapter`
    writes it, and PEFT stores a copy that was trained apart from the others by one name.
    """
    keys = [adapter.others.get(name) for name, (module, leaf) in places.items() if getattr(module, leaf) is weight]
    if everywhere and None in keys and len(keys) > 1:
        return False
    return all(key is None or torch.equal(adapter.tensor(key), value) for key in keys)


def _kept_values(places: Places, heads: dict[str, Tensor]) -> list[str]:
    """Faults of parts that the present adapter has trained whole, and for which the new one has no values."""
    return [
        f"{name!r} was trained whole with the model's present adapter, and the new adapter has no values for it; load "
        "the adapter into the plain model"
        for name, (module, leaf) in places.items()
        if name not in heads and leaf in trained_whole(module)
    ]
