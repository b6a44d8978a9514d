"""The trained weights of the best validation since the last change of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import isnan, nan
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from dynrank.callbacks.lightning.resume import has_missed_validation
from dynrank.callbacks.lightning.validation import logged_since, validate
from dynrank.distributed.processes import mean_over_processes
from dynrank.driver.event import RankEvent
from dynrank.errors import ConfigurationError
from dynrank.private import persistent_buffers


class BestWeights(Checkpoint):
    """Keeps the trained weights of the best validation since the last change of ranks.

    Persistent buffers, as the running statistics of BatchNorm, are kept with them. A change that is kept forgets them,
    because they have other ranks. They are part of each checkpoint, so a resumed run ends with the same ones.
    Validations for a change, or of NaN, do not count. If no validation came after the last step, one is made, which
    nothing logs; a run that is resumed behind it calls no hook, so ``trainer.validate`` counts, too. In several
    processes the mean of their metrics decides.

    Args:
        monitor: a metric that validations log.
        mode: ``min`` if a smaller value is better.

    Attributes:
        step: optimizer steps made before the best validation; None: there was none since the last change.
        value: the metric in that validation.

    Raises:
        ConfigurationError: if ``mode`` is neither.

    Example::

        best = BestWeights("val/accuracy", mode="max")
        Trainer(callbacks=[RankScheduler(8), best]).fit(module)
        best.restore(module)
    """

    def __init__(self, monitor: str, mode: Literal["min", "max"] = "min") -> None:
        if mode not in ("min", "max"):
            raise ConfigurationError(f"mode must be min or max, got {mode!r}")
        self.monitor = monitor
        self.mode = mode
        self.step: int | None = None
        self.value = 0.0
        self._weights: dict[str, Tensor] = {}
        self._last_validated = 0
        # Those before the present validation.
        self._metrics: Mapping[str, Any] = {}

    @property
    def why_none(self) -> str:
        """Why there is no best validation, if ``step`` is None."""
        return f"no validation after the last change of ranks had a number as {self.monitor!r}"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._last_validated != trainer.global_step and has_missed_validation(trainer):
            self._validate(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._metrics = dict(trainer.callback_metrics)

    # Hooks of the module may put an average of the weights in place for a validation; its own on_validation_end, in
    # which it puts them back, comes after this one.
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn in ("fit", "validate") and not trainer.sanity_checking:
            self._take(trainer, pl_module, logged_since(self._metrics, trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Without an earlier validation the weights of the last step are the only ones.
        if self.misses(trainer):
            self._validate(trainer, pl_module)

    def misses(self, trainer: Trainer) -> bool:
        """Whether there is a best validation, and none of the weights of the last step."""
        return self.step is not None and self._last_validated < trainer.global_step

    def _validate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the present weights, of which nobody else hears."""
        validate(trainer, pl_module, ended=partial(self._take, trainer, pl_module))

    def _take(self, trainer: Trainer, pl_module: LightningModule, metrics: Mapping[str, Any]) -> None:
        """Keep the weights that were validated if they are better."""
        self._last_validated = trainer.global_step
        # A metric that a module logs without sync_dist differs between processes, which have to keep the same weights.
        value = mean_over_processes(float(metrics.get(self.monitor, nan)))
        gain = self.value - value if self.mode == "min" else value - self.value
        if gain > 0 or (self.step is None and not isnan(value)):
            self.step = trainer.global_step
            self.value = value
            kept = _trained(pl_module) | _buffers(pl_module)
            self._weights = {name: tensor.detach().cpu().clone() for name, tensor in kept.items()}

    def on_rank_change(self, trainer: Trainer, pl_module: LightningModule, event: RankEvent) -> None:
        if not event.undone:
            self.step = None
            self._weights = {}

    def restore(self, module: nn.Module) -> None:
        """Put the best weights into ``module``; warns if there are none.

        Raises:
            ConfigurationError: if a parameter was frozen in the best validation, and is not any more.
        """
        if self.step is None:
            rank_zero_warn(f"{self.why_none}, so no weights are restored (BestWeights)")
        elif unknown := sorted(_trained(module).keys() - self._weights.keys()):
            raise ConfigurationError(
                f"{unknown[0]!r} was frozen in the best validation, at step {self.step}, and is trained now, so its "
                "value of then is not known; unfreeze it before training, or keep the last weights"
            )
        present: dict[str, Tensor] = dict(module.named_parameters()) | _buffers(module)
        with torch.no_grad():
            for name, value in self._weights.items():
                present[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return {
            "monitor": self.monitor,
            "step": self.step,
            "value": self.value,
            "weights": self._weights,
            "last_validated": self._last_validated,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        # Values of another metric, by which a resumed run may judge, cannot be compared.
        if state_dict.get("monitor", self.monitor) != self.monitor:
            return
        self.step = state_dict["step"]
        self.value = state_dict["value"]
        self._weights = state_dict["weights"]
        self._last_validated = state_dict["last_validated"]


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """Those that a state dict has."""
    owners = dict(module.named_modules())
    return {f"{owner}.{name}".lstrip("."): b for owner, of in owners.items() for name, b in persistent_buffers(of)}


def _trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
