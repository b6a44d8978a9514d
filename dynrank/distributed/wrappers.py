"""The wrappers of DDP, Lightning, Fabric and accelerate around models and optimizers.

DDP follows a change of its parameters' shapes, whichever library has wrapped the model.
"""

from collections.abc import Iterable
from typing import Any

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

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


def ddp_modules(model: nn.Module) -> list[DistributedDataParallel]:
    """The DDP modules in ``model``, which is wrapped as the training loop calls it."""
    return [module for module in model.modules() if isinstance(module, DistributedDataParallel)]


def pause_ddp(modules: Iterable[DistributedDataParallel]) -> list[tuple[Any, dict[str, Any]]]:
    """Remove the reducers, whose buckets fit the old shapes, from ``modules``.

    Training loops keep references to their DDP module, so it cannot be replaced by a new one. The result is the
    argument of :func:`resume_ddp`, to call when parameters have their new shapes.
    """
    paused: list[tuple[Any, dict[str, Any]]] = [
        (module, module.__getstate__())  # type: ignore[no-untyped-call]
        for module in modules
    ]
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
