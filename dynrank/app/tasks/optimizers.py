"""The optimizer and learning-rate schedule of a run, from plain configuration values."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Annotated, Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from pydantic import Field
from torch import Tensor, nn
from transformers import get_scheduler

from dynrank.errors import ConfigurationError, checked_call

# Optimizers that are not torch's, with the module that has them.
ELSEWHERE = {
    "bitsandbytes.Adam8bit": "bitsandbytes.optim",
    "bitsandbytes.AdamW8bit": "bitsandbytes.optim",
}


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon for the matrices of the group "adapter", and AdamW for everything else, as one optimizer.

    A step of a matrix has the root mean square of AdamW's (Liu et al., arXiv:2502.16982), so AdamW's rates suit both.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        # torch's classes check the values.
        self._parts()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts():
            part.state = self.state
            part.step()
        return loss

    def _parts(self) -> list[torch.optim.Optimizer]:
        """Both optimizers, made anew each time, so that only this one's state is saved, copied and carried."""
        matrices = []
        others = []
        for group in self.param_groups:
            split: dict[bool, list[Tensor]] = {True: [], False: []}
            for parameter in group["params"]:
                split[group.get("name") == "adapter" and parameter.ndim == 2].append(parameter)
            matrices.append({**group, "params": split[True]})
            others.append({**group, "params": split[False]})
        return [torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw"), torch.optim.AdamW(others)]


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
        name: a class of torch.optim, or one of ``ELSEWHERE``; with Muon, AdamW trains all but the adapter's matrices.
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
    if name in ELSEWHERE:
        try:
            return getattr(import_module(ELSEWHERE[name]), name.rpartition(".")[2])
        except ImportError as error:
            package = name.partition(".")[0]
            raise ConfigurationError(
                f"optimizer.name={name} needs {package} ({error}): pip install {package}, or 'dynrank[optimizers]'"
            ) from error
    cls = Muon if name == "Muon" else getattr(torch.optim, name, None)
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise ConfigurationError(
            f"optimizer.name must be a class of torch.optim or one of {sorted(ELSEWHERE)}, got {name!r}"
        )
    return cls
