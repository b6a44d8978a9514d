"""The optimizer and learning-rate schedule of a run, from plain configuration values."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Annotated, Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from pydantic import Field
from torch import nn
from transformers import get_scheduler

from dynrank.errors import ConfigurationError, checked_call


@checked_call
def make_optimizer(
    adapter: Sequence[nn.Parameter],
    head: Sequence[nn.Parameter],
    total_steps: int,
    *,
    name: str = "AdamW",
    lr: float = 1e-3,
    head_lr: float = 4e-3,
    weight_decay: float = 0.0,
    warmup_steps: Annotated[int, Field(ge=0)] = 40,
    decay: Literal["constant_with_warmup", "linear", "cosine", "warmup_stable_decay"] = "warmup_stable_decay",
    decay_share: Annotated[float, Field(ge=0, le=1)] = 0.2,
    options: Mapping[str, Any] = {},
) -> OptimizerLRScheduler:
    """The value for ``LightningModule.configure_optimizers`` to return; the rate changes after every optimizer step.

    Args:
        adapter: parameters trained at ``lr``.
        head: parameters trained at ``head_lr`` (a new head needs a higher rate than an adapter); may be empty.
        total_steps: optimizer steps of the run.
        name: a class of torch.optim, or one of bitsandbytes: ``bitsandbytes.AdamW8bit``.
        lr: peak learning rate.
        head_lr: peak learning rate of the head.
        weight_decay: weight decay of the optimizer.
        warmup_steps: optimizer steps of linear warm-up, at most a quarter of ``total_steps``.
        decay: decay of the rate; warmup_stable_decay keeps the peak rate and decays linearly at the end.
        decay_share: share of ``total_steps`` in which warmup_stable_decay decays.
        options: further keyword arguments of the optimizer.
    """
    groups: list[dict[str, Any]] = [
        {"params": list(adapter), "name": "adapter"},
        {"params": list(head), "lr": head_lr, "name": "head"},
    ]
    groups = [group for group in groups if group["params"]]
    make = _optimizer_class(name)
    try:
        optimizer: torch.optim.Optimizer = make(groups, lr=lr, weight_decay=weight_decay, **options)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"optimizer {name} does not take these values: {error}; set optimizer") from error
    extra = {}
    if decay == "warmup_stable_decay":
        extra = {"num_decay_steps": round(decay_share * total_steps), "decay_type": "linear"}
    warmup_steps = min(warmup_steps, total_steps // 4)
    scheduler = get_scheduler(decay, optimizer, warmup_steps, total_steps, scheduler_specific_kwargs=extra)
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
