"""The keys of ``optimizer`` with their defaults; without torch, which loads slowly."""

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field

from dynrank.errors import checked


@checked
class OptimizerKeys:
    """What an optimizer and its learning rates are made of.

    Attributes:
        name: a class of torch.optim, or one of bitsandbytes: ``bitsandbytes.AdamW8bit``.
        lr: peak learning rate.
        head_lr: peak learning rate of the head; a new head needs a higher rate than an adapter.
        weight_decay: weight decay of the optimizer.
        warmup_steps: optimizer steps of linear warm-up, at most a quarter of the run.
        decay: decay of the rate; warmup_stable_decay keeps the peak rate and decays linearly at the end.
        decay_share: share of the run in which warmup_stable_decay decays.
        options: further keyword arguments of the optimizer.
    """

    name: str = "AdamW"
    lr: float = 1e-3
    head_lr: float = 4e-3
    weight_decay: float = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 40
    decay: Literal["constant_with_warmup", "linear", "cosine", "warmup_stable_decay"] = "warmup_stable_decay"
    decay_share: Annotated[float, Field(ge=0, le=1)] = 0.2
    options: dict[str, Any] = field(default_factory=dict)
