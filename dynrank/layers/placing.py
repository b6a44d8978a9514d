"""Putting LoRA layers into a model, finding them again, and dissolving them into plain layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dynrank.errors import ConfigurationError
from dynrank.kernels.backends import check_backend
from dynrank.layers.base import LoRALayer, initial_scaling
from dynrank.layers.choosing import target_names
from dynrank.layers.compiled import named_modules, uncompiled
from dynrank.layers.frozen_base import follow_base
from dynrank.layers.grouping import group_layers
from dynrank.layers.kinds import LoRAConv1D, LoRALinear, layer_class
from dynrank.layers.peft_layers import peft_layers, refuse_peft
from dynrank.layers.quantized import is_quantized, mark_unpacked, unpack_fault
from dynrank.layers.ranked import RankedLayer, check_capacity
from dynrank.rank_map import load_rank_map, parse_rank_map, resolve_rank_map

M = TypeVar("M", bound=nn.Module)


def add_lora(
    model: M,
    *,
    rank: int,
    alpha: float | None = None,
    target_modules: str | Sequence[str] = "all-linear",
    rank_map: str | Path | Mapping[str, Any] | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    modules_to_save: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    capacity: int | None = None,
    group: bool = False,
) -> M:
    """Freeze ``model`` and put LoRA layers at ``target_modules``, in place; nothing is changed before all is checked.

    Args:
        model: any module; names in the other arguments are those of its ``named_modules()``.
        rank: rank of layers that no rule of ``rank_map`` sets.
        alpha: scaling starts at alpha / rank (alpha / sqrt(rank) for rsLoRA, arXiv:2312.03732); ``rank`` when None.
        target_modules: see :func:`dynrank.layers.choosing.target_names`.
        rank_map: an override file, or its ``rank_pattern`` mapping.
        dropout: on the input of the update, while training.
        rslora: start at alpha / sqrt(rank).
        modules_to_save: names of modules that are trained whole and saved with the adapter (a fresh head).
        dtype: dtype of the factors.
        backend: who makes the products with the factors, see :func:`dynrank.kernels.backends.chosen_backend`.
        capacity: highest rank that a layer may get. Where it is given, a model compiled by torch.compile serves every
            rank from 2 to it without being compiled again.
        group: layers that read one x (q, k, v; gate, up) share the pass over it, and dropout's mask; see
            :func:`dynrank.layers.grouping.shared_output`. On CPU it pays where there is dropout.

    Returns:
        ``model`` itself.

    Raises:
        ConfigurationError: if a name, rank, rule or value cannot be used, or the model has LoRA layers already.
    """
    refuse_peft(
        model, "add_lora", "resize and RankScheduler change its layers in place; or call its merge_and_unload() first"
    )
    if own_layers(model):
        raise ConfigurationError("the model has LoRA layers already; merge them first (dynrank.merge)")
    if alpha is not None and not 0 < alpha < float("inf"):
        raise ConfigurationError(f"alpha must be a finite number above 0, got {alpha}; set lora.alpha")
    if not dtype.is_floating_point:
        raise ConfigurationError(f"dtype must be a floating-point dtype, got {dtype}")
    if not isinstance(rank, int) or rank < 1:
        raise ConfigurationError(f"rank must be an int of at least 1, got {rank!r}; set lora.rank")
    options = {"dropout": dropout, "dtype": dtype, "backend": check_backend(backend), "capacity": capacity}
    modules = dict(named_modules(model))
    _check_modules_to_save(model, modules_to_save)
    bases = {name: modules[name] for name in target_names(model, target_modules, modules_to_save)}
    shapes = {}
    for name, base in bases.items():
        cls = layer_class(base)
        assert cls is not None  # target_names has seen to it
        shapes[name] = cls.shape_of(base)
    if isinstance(rank_map, str | Path):
        rules = load_rank_map(rank_map)
    else:
        rules = parse_rank_map(rank_map or {}, source="rank_map")
    resolved = resolve_rank_map(shapes, rules, rank=rank, alpha=alpha if alpha is not None else rank)
    check_capacity(capacity, max((at.rank for at in resolved.values()), default=0))
    layers = {}
    for name, base in bases.items():
        at = resolved[name]
        scaling = initial_scaling(at.alpha, at.rank, rslora)
        layers[name] = make_layer(base, rank=at.rank, scaling=scaling, **options)
        layers[name].final_rank, layers[name].pinned, layers[name].rule = at.final_rank, at.pinned, at.rule
    place_layers(model, layers, modules_to_save, group=group)
    return model


def _check_modules_to_save(model: nn.Module, names: Sequence[str]) -> None:
    modules, tied = dict(named_modules(model)), tied_weights(model)
    for name in names:
        if name not in modules:
            raise ConfigurationError(f"no module is named {name!r}; fix modules_to_save")
        if any(id(parameter) in tied for parameter in modules[name].parameters()):
            raise ConfigurationError(
                f"{name!r} shares a weight with another module and cannot be trained whole (modules_to_save): "
                "adapt it with LoRA (lora.target_modules) or untie it first"
            )
        taken = [other for other in modules if other.endswith(name) and other not in names]
        if taken:  # PEFT compares ends of names, not whole parts
            raise ConfigurationError(f"PEFT would take {taken[0]!r} for {name!r} (modules_to_save); rename one of them")


def make_layer(base: nn.Module, **options: Any) -> LoRALayer:
    """The LoRA layer for ``base``, not yet in any model; ``options`` are those of :class:`LoRALayer`."""
    cls = layer_class(base)
    if cls is None:
        raise ConfigurationError(f"{type(base).__name__} cannot have LoRA")
    return cls(base, **options)


def place_layers(
    model: nn.Module,
    layers: Mapping[str, LoRALayer],
    modules_to_save: Sequence[str] = (),
    *,
    group: bool | None = None,
) -> None:
    """Freeze ``model``, put each layer where its base stands (everywhere, if shared), unfreeze ``modules_to_save``.

    LoRA layers that are in the model give way to the new layer of their base, or to the base itself. ``group`` is as in
    :func:`add_lora`; None for what the model had last.
    """
    model.requires_grad_(False)
    new, old = {id(layer.base): layer for layer in layers.values()}, own_layers(model).values()
    adapted = {id(layer.base) for layer in old}
    replacements: dict[int, nn.Module] = {id(layer): new.get(id(layer.base), layer.base) for layer in old}
    _replace(model, replacements | {base: layer for base, layer in new.items() if base not in adapted})
    for layer in layers.values():
        layer.train(layer.base.training)
    group = vars(model).get("_groups_layers", False) if group is None else group
    vars(model)["_groups_layers"] = group
    if group:
        group_layers(model, (LoRALinear, LoRAConv1D))
    for name in modules_to_save:
        for module in model.get_submodule(name).requires_grad_(True).modules():
            for leaf in [*module._parameters, *module._buffers]:
                base_values(module, note=True).setdefault(leaf, None)
    model._has_lora = True  # type: ignore[assignment]
    follow_base(model)


def base_values(module: nn.Module, *, note: bool = False) -> dict[str, Tensor | None]:
    """What a module that is trained whole held before, by parameter or buffer; None where that is not kept.

    Args:
        module: of a model with LoRA layers.
        note: the result is to be written to.
    """
    values: dict[str, Tensor | None] = vars(module).get("_base_values", {})
    if note:
        vars(module)["_base_values"] = values
    return values


def lora_layers(model: nn.Module) -> Iterator[tuple[str, RankedLayer]]:
    """Every LoRA layer of ``model`` with its name, in the order of ``named_modules()``.

    Names are those of the model before ``torch.compile`` has wrapped it or a part of it.

    In a model wrapped by PEFT they are views of PEFT's layers, for the adapter that is active.

    Raises:
        ConfigurationError: if a layer of PEFT computes something else than a plain LoRA layer (see
            :func:`dynrank.layers.peft_layers.peft_layers`), or the model holds layers of both libraries.
    """
    own, theirs = own_layers(model), peft_layers(model)
    if own and theirs:
        raise ConfigurationError(
            f"the model holds LoRA layers of dynrank ({next(iter(own))!r}) and of PEFT ({next(iter(theirs))!r}); "
            "use one of the two"
        )
    yield from own.items()
    yield from theirs.items()


def own_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The LoRA layers that dynrank has put into ``model``, by name."""
    return {name: module for name, module in named_modules(model) if isinstance(module, LoRALayer)}


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module by every name that it has without LoRA layers, whose bases stand for them."""
    found: list[tuple[str, nn.Module]] = [("", model)]
    while found:
        name, module = found.pop()
        module = uncompiled(module)
        if isinstance(module, LoRALayer):
            module = module.base
        yield name, module
        children = ((f"{name}.{key}" if name else key, child) for key, child in module._modules.items())
        found += reversed([(key, child) for key, child in children if child is not None])


def merge(model: M) -> M:
    """Merge every LoRA layer into its base and take it out, in place; the model is plain afterwards.

    A head tied to an embedding gets a weight of its own (and the model's config says so), since the adapter belongs to
    the head alone. A base that bitsandbytes has packed into 4 bits is unpacked. Weights keep their dtype; the sum is
    made in float32 or wider.

    Raises:
        ConfigurationError: if the model has no LoRA layers, or PEFT's, or a base is packed into 8 bits.
    """
    refuse_peft(model, "merge", "call its merge_and_unload()")
    layers = own_layers(model)
    if not layers:
        raise ConfigurationError("the model has no LoRA layers to merge")
    packed = {name: layer.base for name, layer in layers.items() if is_quantized(layer.base)}
    faults = [f"{name!r}: {fault}" for name, base in packed.items() if (fault := unpack_fault(base))]
    if faults:
        raise ConfigurationError("the model cannot be merged:\n  " + "\n  ".join(faults[:20]))
    if _adapts_tied_weight(model, layers.values()):
        _mark_untied(model)
    for layer in layers.values():
        if not layer.merged:
            layer.merge()
    _replace(model, {id(layer): layer.base for layer in layers.values()})
    mark_unpacked(model)
    return model


def _adapts_tied_weight(model: nn.Module, layers: Collection[LoRALayer]) -> bool:
    places = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    places.update(id(layer.own_weight) for layer in layers if layer.merged)
    return any(places[id(layer.own_weight)] > 1 for layer in layers)


def _replace(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    for parent in list(model.modules()):
        if isinstance(parent, LoRALayer) and id(parent) not in replacements:
            continue  # the base inside a layer just placed stays where it is
        for attribute, child in list(parent._modules.items()):  # named_children() skips a second name of one child
            if id(child) in replacements:
                setattr(parent, attribute, replacements[id(child)])


def tied_weights(model: nn.Module) -> set[int]:
    """Ids of the parameters that stand under more than one name."""
    seen: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    return {key for key, count in seen.items() if count > 1}


def _mark_untied(model: nn.Module) -> None:
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
