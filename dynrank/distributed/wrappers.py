"""The wrappers of DDP, Lightning, Fabric and accelerate around models and optimizers.

DDP follows a change of its parameters' shapes, whichever library has wrapped the model.
"""

import gc
from collections.abc import Iterable
from typing import Any

from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dynrank.distributed.processes import process_count
from dynrank.errors import ConfigurationError
from dynrank.private import is_fabrics


def unwrapped_model(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of DDP and of Lightning Fabric; accelerate wraps only by DDP."""
    inside: Any = model
    while isinstance(inside, DistributedDataParallel) or is_fabrics(inside):
        inside = inside.module
    return inside  # type: ignore[no-any-return]


def unwrapped_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer inside the wrapper of Lightning, Fabric or accelerate, if it has one."""
    raw: Optimizer = getattr(optimizer, "optimizer", optimizer)
    return raw


def ddp_modules(model: nn.Module) -> list[Any]:
    """The DDP modules around ``model``, by a search of all objects: a model has no reference to them."""
    if process_count() == 1:
        return []
    found = [o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel)]
    return [module for module in found if any(part is model for part in module.modules())]


def pause_ddp(model: nn.Module) -> list[tuple[Any, dict[str, Any]]]:
    """Remove the reducers, whose buckets fit the old shapes, from the DDP modules around ``model``.

    Training loops keep references to their DDP module, so it cannot be replaced by a new one. The result is the
    argument of :func:`resume_ddp`, to call when parameters have their new shapes.
    """
    paused = [(module, module.__getstate__()) for module in ddp_modules(model)]
    for _, state in paused:
        check_hooks(of_hook for _, of_hook in state["_comm_hooks"])
    for module, _ in paused:
        del module.reducer, module.logger
    return paused


def resume_ddp(paused: list[tuple[Any, dict[str, Any]]]) -> None:
    """Give the DDP modules new reducers, by the code for unpickling, and register their communication hooks again."""
    for module, state in paused:
        module.__setstate__(state)
        # Unpickling does not reset this flag. A static graph would then not average the first backward's gradients.
        module._static_graph_delay_allreduce_enqueued = False
        for hook, of_hook in module._comm_hooks:
            distributed._register_comm_hook(  # type: ignore[attr-defined]
                module.reducer, of_hook, hook
            )


def check_hooks(states: Iterable[object]) -> None:
    """Refuse communication hooks of DDP with a state that cannot adapt to a change of rank."""
    for state in states:
        if isinstance(state, PostLocalSGDState | PowerSGDState):
            raise ConfigurationError(
                f"a communication hook of DDP with {type(state).__name__} lets the processes' adapters differ, or "
                "keeps gradients of the old shapes; use a hook without state, such as fp16_compress_hook, or none"
            )
