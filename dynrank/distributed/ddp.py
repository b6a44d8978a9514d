"""DDP around a model whose parameters change shape, whoever has put it there."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.nn.parallel import DistributedDataParallel

from dynrank.distributed.processes import process_count
from dynrank.errors import ConfigurationError


def ddp_modules(model: nn.Module) -> list[Any]:
    """The DDP modules around ``model``, which keeps no way to them."""
    if process_count() == 1:
        return []
    found = [o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel)]
    return [module for module in found if any(part is model for part in module.modules())]


def take_reducers(model: nn.Module) -> list[tuple[Any, dict[str, Any]]]:
    """Take the reducers, whose buckets are as large as parameters were, off the DDP modules around ``model``.

    A loop keeps its DDP module in variables, so that cannot be replaced by another one.

    Returns:
        What :func:`give_back_reducers` needs, once parameters have their new shapes.
    """
    torn = [(module, module.__getstate__()) for module in ddp_modules(model)]
    for _, state in torn:
        check_hooks(of_hook for _, of_hook in state["_comm_hooks"])
    for module, _ in torn:
        del module.reducer, module.logger
    return torn


def give_back_reducers(torn: list[tuple[Any, dict[str, Any]]]) -> None:
    """Give the DDP modules other reducers, as when they are unpickled, and what was registered with the old ones."""
    for module, state in torn:
        module.__setstate__(state)
        # Unpickling leaves this flag: a static graph would then not average the gradients of the first backward.
        module._static_graph_delay_allreduce_enqueued = False
        for hook, of_hook in module._comm_hooks:
            distributed._register_comm_hook(  # type: ignore[attr-defined]
                module.reducer, of_hook, hook
            )


def check_hooks(states: Iterable[object]) -> None:
    """Refuse communication hooks of DDP, by their states, that cannot follow a change of rank."""
    for state in states:
        if isinstance(state, PostLocalSGDState | PowerSGDState):
            raise ConfigurationError(
                f"a communication hook of DDP with {type(state).__name__} lets the processes' adapters differ, or "
                "remembers gradients of the old shapes; use one without memory, such as fp16_compress_hook, or none"
            )
