"""Models and optimizers without the wrappers of DDP, Lightning, Fabric and accelerate."""

from __future__ import annotations

from typing import Any

from torch import nn
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
