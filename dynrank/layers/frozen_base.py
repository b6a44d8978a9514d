"""Checkpoints without the frozen base (the weights of the model below its adapter), and the check on loading.

Instead of the base a state dict holds a mark for each adapted model, under ``NAME.`` + ``MARK``: the model's title, and
a fingerprint of every parameter that was left out. Before anything changes, ``load_state_dict`` compares the
fingerprints with the model that it loads into. Loading then leaves that model's base unchanged. In a file that holds
nothing but tensors (safetensors) a mark is the bytes of its JSON.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dynrank.digest import digest
from dynrank.errors import ConfigurationError
from dynrank.layers.foreign import class_if_imported, store_on, stored_on
from dynrank.layers.lora_layer import LoRALayer
from dynrank.layers.quantized import plain_values
from dynrank.layers.vocabulary import extended_parameters
from dynrank.private import source_of

MARK = "_frozen_base"
# How many values of each parameter a fingerprint covers.
SAMPLES = 256
# Multiples of the golden ratio modulo 1 are evenly spread for any number of them.
_GOLDEN = 0.6180339887498949
# Adapters and heads are no part of the base even while they are frozen.
_ADAPTER = re.compile(r"(^|\.)(lora_|modules_to_save\.)")


def adapted_models(model: nn.Module) -> dict[str, nn.Module]:
    """{prefix of its names in ``model``: a model that :func:`dynrank.add_lora`, ``load_adapter`` or PEFT adapted}."""
    found: dict[str, nn.Module] = {}
    for name, root in model.named_modules():
        prefix = f"{name}." if name else ""
        # The record stays after a merge.
        adapted = stored_on(root, "adapted") and any(isinstance(module, LoRALayer) for module in root.modules())
        adapted = adapted or isinstance(vars(root).get("peft_config"), dict)
        if adapted and not any(prefix.startswith(outer) for outer in found):
            found[prefix] = root
    return found


def without_base(
    model: nn.Module, state_dict: Mapping[str, Any], trained: Collection[Tensor], known: dict[str, str] | None = None
) -> dict[str, Any]:
    """``state_dict`` with marks instead of the frozen parameters of the adapted models in ``model``.

    The result keeps adapters, the heads that PEFT stores per adapter, and embeddings with added tokens, even if they
    are frozen, the parameters in ``trained``, and everything outside of adapted models. Fingerprints are taken from
    ``known``; new ones are added.
    """
    known = {} if known is None else known
    kept = dict(state_dict)
    for prefix, root in adapted_models(model).items():
        spared = {*map(id, trained), *map(id, extended_parameters(root))}
        fingerprints = {}
        for name, parameter in root.named_parameters(remove_duplicate=False):
            key = prefix + name
            frozen = not (parameter.requires_grad or id(parameter) in spared or _ADAPTER.search(name))
            if frozen and key in kept:
                value = kept.pop(key)
                if key not in known:
                    known[key] = fingerprint(value)
                fingerprints[name] = known[key]
        # bitsandbytes stores further entries under the name of a weight.
        quantisation = tuple(f"{prefix}{name}." for name in fingerprints)
        kept = {key: value for key, value in kept.items() if not key.startswith(quantisation)}
        source = source_of(root)
        title = f"{type(root).__name__} {source!r}" if source else type(root).__name__
        kept[prefix + MARK] = {"model": title, "parameters": fingerprints}
    return kept


def with_marks_as_tensors(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """``state_dict`` for a file that holds nothing but tensors; ``load_state_dict`` takes both forms."""
    marks = {start + MARK: json.dumps(mark).encode() for start, mark in _marks(state_dict)}
    return {**state_dict, **{key: torch.tensor([*mark], dtype=torch.uint8) for key, mark in marks.items()}}


def fingerprint(parameter: Tensor, dtype: torch.dtype = torch.bfloat16) -> str:
    """A hash of the shape of ``parameter`` and of 256 of its values, at fixed indices; collective if it is sharded.

    The values are rounded to ``dtype`` first; to bfloat16, because ``precision=bf16-true`` rounds a base in place.
    """
    if parameter.is_meta:
        raise ConfigurationError("a base on the meta device has no values to compare; load its weights first")
    values = plain_values(parameter)
    if isinstance(values, class_if_imported("torch.distributed.tensor.DTensor")):
        values = values.full_tensor()
    indices = torch.arange(min(values.numel(), SAMPLES))
    if values.numel() > SAMPLES:
        indices = ((indices * _GOLDEN) % 1 * values.numel()).long()
    sample = values.flatten()[indices.to(values.device)]
    return digest([list(values.shape), sample.to(dtype) if sample.is_floating_point() else sample])


def follow_base(model: nn.Module) -> None:
    """Let ``model.load_state_dict`` load state dicts without a frozen base; a second call does nothing.

    :func:`dynrank.add_lora` calls this.
    """
    if not stored_on(model, "follows_base"):
        store_on(model, "follows_base", True)
        model.register_load_state_dict_pre_hook(_fill_in_base)  # type: ignore[no-untyped-call]


def _fill_in_base(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Add the model's own parameters to ``state_dict``; loading then copies each of them onto itself."""
    own = check_base(model, state_dict, prefix)
    for start in dict(_marks(state_dict, prefix)):
        del state_dict[start + MARK]
    state_dict.update(own)


def check_base(model: nn.Module, state_dict: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """The parameters of ``model`` that ``state_dict`` leaves out, by their names in it; raises if the base differs.

    Names of ``model``'s parameters have ``prefix`` in ``state_dict``.
    """
    found: dict[str, Tensor] = {}
    for start, mark in _marks(state_dict, prefix):
        own = {prefix + name: value for name, value in model.state_dict(keep_vars=True).items()}
        known = {start + name: stored for name, stored in mark["parameters"].items()}
        wrong = [name for name in known if name not in own or fingerprint(own[name]) != known[name]]
        if wrong:
            fault = "had another shape or other values than" if wrong[0] in own else "is missing"
            raise ConfigurationError(
                f"the checkpoint was made on another base: {wrong[0]!r} {fault} here ({len(wrong)} of {len(known)} "
                f"frozen parameters differ); load it into its own base, {mark['model']}",
                "ckpt_path",
                "model",
            )
        found |= {name: own[name] for name in known}
    return found


def left_out(state_dict: Mapping[str, Any]) -> set[str]:
    """Names of the parameters that ``state_dict`` leaves out, by its marks."""
    return {start + name for start, mark in _marks(state_dict) for name in mark["parameters"]}


def lacks_base(model: nn.Module, state_dict: Mapping[str, Any]) -> bool:
    """Whether ``state_dict`` leaves a base out, for loading without ``load_state_dict``; raises if the base differs.

    Only the names and the marks in ``state_dict`` are read.
    """
    if not dict(_marks(state_dict)):
        return False
    own = check_base(model, state_dict)
    missing = sorted(model.state_dict().keys() - state_dict.keys() - own.keys())
    if missing:
        raise ConfigurationError(f"the checkpoint lacks {missing[:3]}, which its base does not hold", "ckpt_path")
    return True


def _marks(state_dict: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(prefix of an adapted model's names, its mark) for those whose names start with ``prefix``."""
    for key, mark in state_dict.items():
        if key.startswith(prefix) and f".{key}".endswith(f".{MARK}"):
            if isinstance(mark, Tensor):
                mark = json.loads(bytes(mark.tolist()))
            if not isinstance(mark, dict) or "model" not in mark or not isinstance(mark.get("parameters"), dict):
                raise ConfigurationError(f"the checkpoint is broken: {key!r} is no mark of a base", "ckpt_path")
            yield key.removesuffix(MARK), mark
