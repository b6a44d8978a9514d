"""The frozen base of an adapted model: left out of a checkpoint, and known again when that is loaded.

A state dict without its base holds, for each adapted model, a mark under ``NAME.`` + ``MARK``: shape and sampled values
of every parameter that was left out. ``load_state_dict`` of a model that follows it compares the mark with what the
model holds, before anything is loaded, and then does not miss those parameters (nor accepts that others are missing).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dynrank.errors import ConfigurationError
from dynrank.layers.base import LoRALayer
from dynrank.layers.quantized import plain_values

__all__ = ["MARK", "check_base", "follow_base", "frozen_bases", "lacks_base", "left_out", "sampled", "without_base"]

MARK = "_frozen_base"
SAMPLES = 256  # values per parameter: 0.3 MB for the 291 of a 7B model
_GOLDEN = 0.6180339887498949  # multiples of it, taken modulo 1, lie evenly whatever their number
_ADAPTER = re.compile(r"(^|\.)(lora_|modules_to_save\.)")  # also of adapters and heads that are frozen at the moment


def follow_base(model: nn.Module) -> None:
    """From now on ``model.load_state_dict`` takes state dicts without a frozen base; a second call does nothing.

    :func:`dynrank.add_lora` calls it for the model that it adapts.
    """
    if not getattr(model, "_follows_base", False):
        model._follows_base = True  # type: ignore[assignment]
        model.register_load_state_dict_pre_hook(_take_marks)  # type: ignore[no-untyped-call]
        model.register_load_state_dict_post_hook(_excuse)  # type: ignore[no-untyped-call]


def frozen_bases(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """{name of each adapted model in ``model``: its frozen parameters, by names in ``model``}.

    An adapted model is what :func:`dynrank.add_lora`, ``load_adapter`` or PEFT was given. Adapters, and heads that PEFT
    keeps per adapter, are no part of the base even where they are frozen, nor is what lies outside adapted models.
    """
    bases: dict[str, dict[str, nn.Parameter]] = {}
    for name, root in model.named_modules():
        adapted = _holds_own_layers(root) or isinstance(vars(root).get("peft_config"), dict)
        if adapted and not any(name == other or name.startswith(_dotted(other)) for other in bases):
            bases[name] = {
                _dotted(name) + inner: parameter
                for inner, parameter in root.named_parameters(remove_duplicate=False)
                if not parameter.requires_grad and not _ADAPTER.search(inner)
            }
    return bases


def sampled(parameter: Tensor) -> Tensor:
    """Values of ``parameter`` at up to ``SAMPLES`` fixed places, on the CPU, in its dtype.

    They are taken again only when the parameter has been written to. Collective where it is sharded.

    Raises:
        ConfigurationError: if it has no values (meta device).
    """
    if parameter.is_meta:
        raise ConfigurationError("a base on the meta device has no values to know it by; load its weights first")
    version = -1 if parameter.is_inference() else parameter._version
    # kept on the tensor: a weak reference would forbid torch to swap it, as Module.to() does under FSDP2
    known: tuple[int, Tensor] | None = vars(parameter).get("_base_sample")
    if known is not None and known[0] == version >= 0:
        return known[1]
    values = plain_values(parameter)
    if isinstance(values, DTensor):
        values = values.full_tensor()
    places = torch.arange(min(values.numel(), SAMPLES))
    if values.numel() > SAMPLES:
        places = ((places * _GOLDEN) % 1 * values.numel()).long()
    values = values[None] if values.ndim == 0 else values  # unravel_index needs a dimension
    at = torch.unravel_index(places.to(values.device), values.shape)
    found = values[at].cpu()
    vars(parameter)["_base_sample"] = (version, found)
    return found


def without_base(
    model: nn.Module, state_dict: Mapping[str, Any], bases: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Any]:
    """``state_dict`` of ``model`` without the parameters in ``bases``, and with the marks that stand for them.

    A parameter stays in if it is trained by now, or has other values than in ``bases``.

    Args:
        model: holds the parameters; under FSDP2 this is a collective call.
        state_dict: of ``model``, or of another with the same names.
        bases: {name of an adapted model: {name of a frozen parameter in ``model``: its samples}}.
    """
    kept = dict(state_dict)
    now = dict(model.named_parameters(remove_duplicate=False))
    for root, samples in bases.items():
        mark = {}
        for name, sample in samples.items():
            parameter = now.get(name)
            if parameter is None or parameter.requires_grad or not _same(sample, sampled(parameter)):
                continue
            mark[name.removeprefix(_dotted(root))] = {"shape": list(parameter.shape), "sample": sample}
            for key in [k for k in kept if k == name or k.startswith(f"{name}.")]:  # and how it is quantised
                del kept[key]
        kept[_dotted(root) + MARK] = {"model": _title(model.get_submodule(root)), "parameters": mark}
    return kept


def left_out(state_dict: Mapping[str, Any]) -> set[str]:
    """Names of the parameters that the marks in ``state_dict`` stand for.

    Raises:
        ConfigurationError: if a mark is none.
    """
    return {prefix + name for prefix, mark in _marks(state_dict) for name in mark["parameters"]}


def check_base(model: nn.Module, state_dict: Mapping[str, Any], prefix: str = "") -> None:
    """Hold the marks in ``state_dict`` against the base that ``model`` has.

    Args:
        model: will load ``state_dict``.
        state_dict: with or without marks.
        prefix: of the names of ``model``'s parameters in ``state_dict``.

    Raises:
        ConfigurationError: if a mark is none, or a parameter is missing here, or has another shape, dtype or other
            values (rounded to the narrower of the two dtypes, since precision=bf16-true rounds a base in place).
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    for at, mark in _marks(state_dict):
        if not at.startswith(prefix):
            continue
        faults = []
        for name, stored in mark["parameters"].items():
            parameter = own.get(at.removeprefix(prefix) + name)
            fault = "is missing" if parameter is None else _difference(stored, parameter)
            if fault:
                faults.append(f"{name!r} {fault}")
        if faults:
            root = at.removeprefix(prefix).removesuffix(".")
            mine = _title(model.get_submodule(root)) if root in dict(model.named_modules()) else type(model).__name__
            raise ConfigurationError(
                f"the checkpoint was made on another base: {faults[0]} here ({len(faults)} of "
                f"{len(mark['parameters'])} frozen parameters differ). Its base was {mark['model']}, this one is "
                f"{mine}; load it into the model that it was trained on (ckpt_path, task.model)"
            )


def lacks_base(model: nn.Module, state_dict: Mapping[str, Any]) -> bool:
    """Whether ``state_dict`` leaves a base out, for who loads it other than by ``load_state_dict``.

    Args:
        model: will load ``state_dict``.
        state_dict: names, with the marks if it has some; other values do not matter.

    Raises:
        ConfigurationError: if the base is another one (see :func:`check_base`), or more than it is missing.
    """
    absent = left_out(state_dict)
    if not absent:
        return any(map(_is_mark, state_dict))
    check_base(model, state_dict)
    missing = sorted(model.state_dict().keys() - state_dict.keys() - absent)
    if missing:
        raise ConfigurationError(f"the checkpoint lacks {missing[:3]}, which are no part of its base; set ckpt_path")
    return True


def _holds_own_layers(root: nn.Module) -> bool:
    """Whether dynrank has adapted it, and nobody has merged the layers since."""
    return "_has_lora" in vars(root) and any(isinstance(module, LoRALayer) for module in root.modules())


def _take_marks(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    check_base(model, state_dict, prefix)
    marks = [key for key in state_dict if key.startswith(prefix) and _is_mark(key)]
    vars(model)["_left_out"] = {name for name in left_out({key: state_dict.pop(key) for key in marks})}


def _excuse(model: nn.Module, incompatible: Any) -> None:
    missing = vars(model).pop("_left_out", set())
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in missing]


def _marks(state_dict: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(prefix, mark) of each."""
    for key, mark in state_dict.items():
        if _is_mark(key):
            parameters = mark.get("parameters") if isinstance(mark, dict) else None
            if not isinstance(parameters, dict) or not all(_is_entry(p) for p in parameters.values()):
                raise ConfigurationError(f"{key!r} says nothing of a frozen base; the checkpoint is broken (ckpt_path)")
            yield key.removesuffix(MARK), {"model": "unknown", **mark}


def _is_mark(key: str) -> bool:
    return key == MARK or key.endswith(f".{MARK}")


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("shape"), list) and isinstance(entry.get("sample"), Tensor)


def _difference(stored: Mapping[str, Any], parameter: Tensor) -> str | None:
    if stored["shape"] != list(parameter.shape):
        return f"had shape {stored['shape']} and has {list(parameter.shape)}"
    theirs, mine = stored["sample"], sampled(parameter)
    if theirs.dtype != mine.dtype:
        if not (theirs.is_floating_point() and mine.is_floating_point()) or theirs.itemsize == mine.itemsize:
            return f"was {theirs.dtype} and is {mine.dtype}"
        narrow = min(theirs, mine, key=lambda sample: sample.itemsize).dtype
        theirs, mine = theirs.to(narrow), mine.to(narrow)
    return None if _same(theirs, mine) else "had other values than"


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bits(one), _bits(other))


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def _title(model: nn.Module) -> str:
    """What a user calls the model: its class, and where transformers has loaded it from."""
    config = getattr(model, "config", None)
    source = getattr(config, "_name_or_path", "")
    return f"{type(model).__name__} {source!r}" if source else type(model).__name__


def _dotted(name: str) -> str:
    return f"{name}." if name else ""
