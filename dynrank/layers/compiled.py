"""Models that ``torch.compile`` has wrapped, in whole or in part, and the names that their modules have without it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

__all__ = ["compiled_alone", "named_modules", "plain_name", "uncompiled"]

_INSIDE = "_orig_mod"  # the one child of torch.compile's wrapper

M = TypeVar("M", bound=nn.Module)


def uncompiled(model: M) -> M:
    """The model inside the wrapper that ``torch.compile(model)`` returns; any other model as it is."""
    while _INSIDE in model._modules:
        inside: Any = model._modules[_INSIDE]
        model = inside
    return model


def plain_name(name: str) -> str:
    """``name`` without the wrappers in it.

    >>> plain_name("layers.0._orig_mod.q_proj.weight")
    'layers.0.q_proj.weight'
    """
    return ".".join(part for part in name.split(".") if part != _INSIDE)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` as it would be if nothing had been compiled."""
    for name, module in model.named_modules():
        if _INSIDE not in module._modules:
            yield plain_name(name), module


def compiled_alone(model: nn.Module) -> set[int]:
    """Ids of the modules that wrappers inside ``model`` hold: one put in their place would never be called."""
    return {id(uncompiled(module)) for module in model.modules() if module is not model and _INSIDE in module._modules}
