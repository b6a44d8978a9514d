"""Ranks that change under torch.compile: code that serves every rank, or that is made anew after a change."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch import Tensor

from dynrank.layers.ranked import RankedLayer


def compile_for_any_size(parameter: Tensor, dim: int) -> None:
    """Let torch.compile leave the size of ``parameter`` along ``dim`` open; a size of 1 it compiles for by itself.

    It takes the shapes of all parameters as given unless told otherwise for the whole process, which this does; it
    changes nothing for parameters whose shapes stay.
    """
    import torch._dynamo  # here, because it takes a second

    torch._dynamo.config.force_parameter_static_shapes = False
    torch._dynamo.maybe_mark_dynamic(parameter, dim)


def forget_compiled(changed: Iterable[RankedLayer]) -> None:
    """After a change of rank, let compiled code be made anew, unless it serves the new ranks.

    torch keeps 8 versions of a function by shapes, and then runs it eagerly and says so in a log only.
    """
    if "torch._dynamo" in sys.modules and any(layer.capacity is None for layer in changed):
        torch.compiler.reset()
