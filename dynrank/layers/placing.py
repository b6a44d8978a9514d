"""Putting LoRA layers into a model, and merging them into their bases."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import Field
from torch import nn

from dynrank.errors import ConfigurationError, Count, Positive, checked_call
from dynrank.kernels.backends import Backend
from dynrank.layers.choosing import PRESETS, target_names
from dynrank.layers.compiled import named_modules
from dynrank.layers.experts import LoRAOwner, stand_ins
from dynrank.layers.finding import modules_by_name, own_layers, own_tensors, tied_weights
from dynrank.layers.foreign import class_if_imported, store_on, stored_on
from dynrank.layers.frozen_base import follow_base
from dynrank.layers.kinds import layer_class
from dynrank.layers.lora_layer import LoRALayer, initial_scaling
from dynrank.layers.peft_layers import refuse_peft
from dynrank.layers.quantized import is_quantized
from dynrank.rank_map import RankRule, read_rank_map, resolve_rank_map

M = TypeVar("M", bound=nn.Module)


@checked_call
def add_lora(
    model: M,
    *,
    rank: Count,
    alpha: Positive | None = None,
    target_modules: str | Sequence[str] = "all-linear",
    rank_map: str | Path | Mapping[Any, Any] | None = None,
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    rslora: bool = False,
    modules_to_save: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    backend: Backend = "auto",
) -> M:
    """Freeze ``model`` and replace ``target_modules`` by LoRA layers, in place, after all arguments are checked.

    Args:
        model: any module; the names in the other arguments are those of its ``named_modules()``.
        rank: rank of layers that no rule of ``rank_map`` sets. If ``target_modules`` has a preset, a layer gets
            min(d_in, d_out) if that is less.
        alpha: scaling starts at alpha / rank (alpha / sqrt(rank) for rsLoRA, arXiv:2312.03732); None: twice the rank.
        target_modules: "all-linear" (all but the output head, and layers whose weights a module around them reads
            without calling them: in nn.MultiheadAttention, nn.TransformerEncoderLayer, Mamba, WavLM), "attention", a
            list of names or their last parts as in PEFT, or a regular expression for whole names.
        rank_map: an override file, or its ``rank_pattern`` mapping: {pattern, "attention" or "mlp": an int, the rank,
            or a mapping of the fields of :class:`dynrank.rank_map.RankRule`}; the first that matches a layer decides.
        dropout: probability of dropout on the input of the update while training.
        rslora: whether scaling starts at alpha / sqrt(rank).
        modules_to_save: names of modules that are trained without LoRA and saved with the adapter (a new head).
        dtype: dtype of the factors.
        backend: "auto", "torch", "triton" or "reference", see kernels/README.md.

    Returns:
        ``model`` itself.

    Raises:
        ConfigurationError: if a name, rank, rule or value cannot be used, or the model has LoRA layers already.

    >>> import torch, dynrank
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    >>> model = dynrank.add_lora(net, rank=4, rank_map={"1": 2})
    >>> {name: (layer.rank, layer.scaling) for name, layer in dynrank.lora_layers(model)}
    {'0': (4, 2.0), '1': (2, 2.0)}
    """
    refuse_peft(
        model, "add_lora", "resize and RankScheduler change its layers in place; or call its merge_and_unload() first"
    )
    if own_layers(model):
        raise ConfigurationError("the model has LoRA layers already; merge them first (dynrank.merge)", "model")
    check_dtype(dtype)
    modules = modules_by_name(model)
    _check_modules_to_save(model, modules_to_save)
    chosen = target_names(model, target_modules, modules_to_save)
    shapes = {name: _class_for(modules[name]).shape_of(modules[name]) for name in chosen}
    rules = read_rank_map(rank_map, RankRule)
    alpha = alpha if alpha is not None else 2 * rank
    # A preset takes layers of all shapes, so one rank need not fit them all.
    targets = {target_modules} if isinstance(target_modules, str) else {*target_modules}
    capped = not targets.isdisjoint(PRESETS)
    resolved = resolve_rank_map(shapes, rules, rank=rank, alpha=alpha, rslora=rslora, capped=capped)
    options = {"dropout": dropout, "dtype": dtype, "backend": backend}
    layers = {}
    for name, at in resolved.items():
        scaling = initial_scaling(at.alpha, at.rank, rslora)
        layers[name] = make_layer(modules[name], rank=at.rank, scaling=scaling, **options)
        layers[name].bounds = at.bounds
        layers[name].rule = at.rule
    place_layers(model, layers, modules_to_save)
    return model


def check_dtype(dtype: object) -> None:
    """Refuse what factors cannot have as their dtype."""
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize >= 2):
        raise ConfigurationError(f"dtype must be a floating-point dtype of at least 16 bits, got {dtype!r}", "dtype")


def _check_modules_to_save(model: nn.Module, names: Sequence[str]) -> None:
    modules = dict(named_modules(model))
    tied = tied_weights(model)
    for name in names:
        if name not in modules:
            raise ConfigurationError(f"no module is named {name!r}; fix modules_to_save", "modules_to_save")
        if any(id(parameter) in tied for parameter in modules[name].parameters()):
            raise ConfigurationError(
                f"{name!r} shares a weight with another module, so it cannot be in modules_to_save; adapt it with LoRA "
                "(target_modules), or untie the weight first",
                "modules_to_save",
            )


def make_layer(base: nn.Module, **options: Any) -> LoRALayer:
    """A LoRA layer for ``base``, not yet in any model; ``options`` are those of :class:`LoRALayer`."""
    return _class_for(base)(base, **options)


def _class_for(base: nn.Module) -> type[LoRALayer]:
    cls = layer_class(base)
    # A module that cannot have LoRA has been refused already.
    assert cls is not None
    return cls


def place_layers(model: nn.Module, layers: Mapping[str, LoRALayer], modules_to_save: Sequence[str] = ()) -> None:
    """Freeze ``model``, replace each base by its layer (everywhere, if it is shared), unfreeze ``modules_to_save``.

    Existing LoRA layers are replaced by the new layer of their base, or by the base itself.
    """
    _refuse_rescaling(model)
    _warn_of_shared(model, layers)
    model.requires_grad_(False)
    new = {id(module.base): module for module in stand_ins(layers.values())}
    old = [module for module in model.modules() if isinstance(module, LoRALayer | LoRAOwner)]
    adapted = {id(module.base) for module in old}
    replacements: dict[int, nn.Module] = {id(module): new.get(id(module.base), module.base) for module in old}
    replace_modules(model, replacements | {base: module for base, module in new.items() if base not in adapted})
    for placed in new.values():
        placed.train(placed.base.training)
    for name in modules_to_save:
        for module in model.get_submodule(name).requires_grad_(True).modules():
            for leaf, _ in own_tensors(module):
                trained_whole(module).add(leaf)
    store_on(model, "adapted", True)
    follow_base(model)


def _refuse_rescaling(model: nn.Module) -> None:
    rwkv = class_if_imported("transformers.models.rwkv.modeling_rwkv.RwkvModel")
    if any(isinstance(module, rwkv) and module.config.rescale_every for module in model.modules()):
        raise ConfigurationError(
            "RWKV divides weights of its layers, in place, in each evaluation, and would not divide their LoRA: set "
            "rescale_every to 0 in the model's config",
            "model",
        )


def _warn_of_shared(model: nn.Module, layers: Mapping[str, LoRALayer]) -> None:
    places = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    shared = [name for name, layer in layers.items() if places[id(layer.base)] > 1]
    if shared:
        warnings.warn(
            f"{len(shared)} of {len(layers)} layers, {shared[0]!r} first, stand in several places of the model, and "
            "get LoRA in all of them. PEFT 0.21 adapts the first place alone, so there the same adapter computes "
            "something else",
            stacklevel=4,
        )


def trained_whole(module: nn.Module) -> set[str]:
    """The parameters and buffers of a module that train without LoRA (``modules_to_save``); callers may add some."""
    if stored_on(module, "trained_whole") is None:
        store_on(module, "trained_whole", set())
    names: set[str] = stored_on(module, "trained_whole")
    return names


def replace_modules(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Replace every occurrence of a module in ``model`` by ``replacements[id(module)]``."""
    for parent in list(model.modules()):
        if isinstance(parent, LoRALayer | LoRAOwner):
            # The base inside a LoRA layer is not replaced.
            continue
        # named_children() would skip further names of the same child.
        for attribute, child in list(parent._modules.items()):
            if id(child) in replacements:
                setattr(parent, attribute, replacements[id(child)])


def merge(model: M) -> M:
    """Add the update of every LoRA layer to its base and replace the layer by the base, in place.

    If an adapted head is tied to an embedding, the head gets its own weight, because the update belongs to the head
    only. So does each other module that shares a weight, and the model's config then says that none are tied. Weights
    keep their dtype; sums are computed in float32 or wider.

    Raises:
        ConfigurationError: if the model has no LoRA layers, or PEFT's, or a base is quantised.

    >>> import torch, dynrank
    >>> dynrank.merge(dynrank.add_lora(torch.nn.Sequential(torch.nn.Linear(8, 8)), rank=4))
    Sequential(
      (0): Linear(in_features=8, out_features=8, bias=True)
    )
    """
    refuse_peft(model, "merge", "call its merge_and_unload()")
    layers = own_layers(model)
    if not layers:
        raise ConfigurationError("the model has no LoRA layers to merge")
    packed = [name for name, layer in layers.items() if is_quantized(layer.base)]
    if packed:
        raise ConfigurationError(
            f"the model cannot be merged: {packed[0]!r} and {len(packed) - 1} more of its layers are quantised; save "
            "the adapter and merge it into the unquantised model (dynrank.load_adapter, dynrank.merge)"
        )
    tied = tied_weights(model)
    if any(id(layer.weight) in tied for layer in layers.values()):
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False
        _untie(model)
    # Layer by layer, so that an interrupted merge counts no update twice.
    for layer in layers.values():
        replace_modules(model, {id(layer): layer.merge()})
    replace_modules(model, {id(module): module.base for module in model.modules() if isinstance(module, LoRAOwner)})
    return model


def _untie(model: nn.Module) -> None:
    """Give each module a weight of its own, where several share one.

    transformers ties all of a model's weights or none: those that stay tied here would be missing in its files.
    """
    seen = set()
    for module in model.modules():
        for leaf, parameter in [*module.named_parameters(recurse=False, remove_duplicate=False)]:
            if id(parameter) in seen:
                setattr(module, leaf, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            seen.add(id(parameter))
