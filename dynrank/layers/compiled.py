"""Models under ``torch.compile``: their modules' plain names, and code that serves changing ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

# The name of the one child of torch.compile's wrapper.
_INSIDE = "_orig_mod"

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


def forget_compiled() -> None:
    """After a change of rank, let compiled code be made anew.

    torch keeps 8 versions of a function by shapes, and then runs it eagerly and says so in a log only.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
