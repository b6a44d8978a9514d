"""The optimizer and learning-rate schedule of a run, from plain configuration values."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from transformers import get_scheduler

from dynrank.app.tasks.optimizer_keys import OptimizerKeys
from dynrank.errors import ConfigurationError


def make_optimizer(
    adapter: Sequence[nn.Parameter], head: Sequence[nn.Parameter], total_steps: int, **values: Any
) -> OptimizerLRScheduler:
    """The value for ``LightningModule.configure_optimizers`` to return; the rate changes after every optimizer step.

    Args:
        adapter: parameters trained at ``lr``.
        head: parameters trained at ``head_lr``; may be empty.
        total_steps: optimizer steps of the run.
        values: fields of :class:`dynrank.app.tasks.optimizer_keys.OptimizerKeys`.
    """
    keys = OptimizerKeys(**values)
    groups: list[dict[str, Any]] = [
        {"params": list(adapter), "name": "adapter"},
        {"params": list(head), "lr": keys.head_lr, "name": "head"},
    ]
    groups = [group for group in groups if group["params"]]
    make = _optimizer_class(keys.name)
    try:
        optimizer: torch.optim.Optimizer = make(groups, lr=keys.lr, weight_decay=keys.weight_decay, **keys.options)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"optimizer {keys.name} does not take these values: {error}; set optimizer") from error
    extra = {}
    if keys.decay == "warmup_stable_decay":
        extra = {"num_decay_steps": round(keys.decay_share * total_steps), "decay_type": "linear"}
    warmup_steps = min(keys.warmup_steps, total_steps // 4)
    scheduler = get_scheduler(keys.decay, optimizer, warmup_steps, total_steps, scheduler_specific_kwargs=extra)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _optimizer_class(name: str) -> Any:
    package, _, own = name.rpartition(".")
    try:
        cls = getattr(import_module("bitsandbytes.optim" if package == "bitsandbytes" else "torch.optim"), own, None)
    except ImportError as error:
        raise ConfigurationError(
            f"optimizer.name={name} needs bitsandbytes ({error}): pip install bitsandbytes, or 'dynrank[optimizers]'"
        ) from error
    if package not in ("", "bitsandbytes") or not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise ConfigurationError(f"optimizer.name must be a class of torch.optim, or bitsandbytes.NAME, got {name!r}")
    return cls
