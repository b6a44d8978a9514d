"""The trained weights of the best validation since the last change of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn

from dynrank.driver.event import RankEvent


class BestWeights(Checkpoint):
    """Keeps the trained weights of the best validation since the last change of ranks.

    A change that is kept forgets them, because they have other ranks. They are part of each checkpoint, so a resumed
    run ends with the same ones. Validations that check or measure a change do not count.

    Args:
        monitor: a metric that validations log.
        mode: ``min`` if a smaller value is better.

    Attributes:
        step: optimizer steps made before the best validation; None: there was none since the last change.
        value: the metric in that validation.
    """

    def __init__(self, monitor: str, mode: Literal["min", "max"] = "min") -> None:
        self.monitor, self.mode = monitor, mode
        self.step: int | None = None
        self.value = 0.0
        self._weights: dict[str, Tensor] = {}
        # Those that are being validated.
        self._validated: dict[str, Tensor] = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # They are copied now, because ScheduleFreeMode puts others in their place when the validation ends.
        self._validated = {name: weight.detach().cpu().clone() for name, weight in _trained(pl_module).items()}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights, self._validated = self._validated, {}
        value = trainer.callback_metrics.get(self.monitor)
        if value is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        gain = self.value - float(value) if self.mode == "min" else float(value) - self.value
        if self.step is None or gain > 0:
            self.step, self.value, self._weights = trainer.global_step, float(value), weights

    def on_rank_change(self, trainer: Trainer, pl_module: LightningModule, event: RankEvent) -> None:
        if not event.undone:
            self.step, self._weights = None, {}

    def restore(self, module: nn.Module) -> None:
        """Put the best weights into ``module``, if there are any."""
        trained = _trained(module)
        with torch.no_grad():
            for name, weight in self._weights.items():
                trained[name].copy_(weight)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "value": self.value, "weights": self._weights}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.step, self.value, self._weights = (state_dict[name] for name in ("step", "value", "weights"))


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
