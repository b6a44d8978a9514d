"""Models under ``torch.compile``: the plain names of their modules, and new compilation after a change of rank."""

import sys
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

# The name of the one child of torch.compile's wrapper.
_INSIDE = "_orig_mod"

M = TypeVar("M", bound=nn.Module)


def uncompiled(model: M) -> M:
    """The model inside the wrapper that ``torch.compile(model)`` returns; any other model itself."""
    inside: Any = _inside(model)
    return model if inside is None else uncompiled(inside)


def plain_name(name: str) -> str:
    """``name`` without the names of the wrappers.

    >>> plain_name("layers.0._orig_mod.q_proj.weight")
    'layers.0.q_proj.weight'
    """
    return ".".join(part for part in name.split(".") if part != _INSIDE)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` without the wrappers of torch.compile."""
    for name, module in model.named_modules():
        if _inside(module) is None:
            yield plain_name(name), module


def compiled_alone(model: nn.Module) -> set[int]:
    """Ids of the modules that a wrapper inside ``model`` holds: the wrapper would not call a replacement."""
    inside = [module for module in model.modules() if module is not model]
    return {id(uncompiled(module)) for module in inside if _inside(module) is not None}


def _inside(module: nn.Module) -> nn.Module | None:
    """What ``module`` is a wrapper around; not by getattr, which other wrappers pass on to what they hold."""
    return dict(module.named_children()).get(_INSIDE)


def forget_compiled() -> None:
    """Make torch compile again after a change of rank.

    torch compiles at most 8 versions of a function for different shapes. Then it runs the function eagerly and only
    writes to a log.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
