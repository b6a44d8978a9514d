"""Lightning's Trainer as a training run whose ranks change."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden

from dynrank.callbacks.lightning import private
from dynrank.callbacks.lightning.validations import generators_of, validate_silently
from dynrank.distributed.wrappers import ddp_modules
from dynrank.driver.event import RankEvent
from dynrank.driver.training import Training
from dynrank.triggers import Run


class LightningTraining(Training):
    """A run of Lightning's Trainer.

    Make it when training starts, because it looks through all modules; :meth:`now` is cheap.

    Args:
        trainer: the trainer, in ``fit``.
        pl_module: the module that it trains.
    """

    validate_by = "give fit() validation data"
    log_by = ""
    validates_alike = True
    knows_schedulers = True

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().__init__(pl_module, trainer.optimizers, trainer.global_step)
        # A run that is resumed behind the last step of an epoch has forgotten the means over it.
        self._first_epoch = trainer.current_epoch + trainer.is_last_batch
        # An own optimizer_step may set rates, as Lightning's manual shows it.
        self._sets_rates = is_overridden("optimizer_step", pl_module)
        # The trainer's model is wrapped by DDP.
        self.ddp = ddp_modules(trainer.strategy.model or pl_module)
        self.trainer = trainer
        self.pl_module = pl_module

    def now(self) -> "LightningTraining":
        """The run itself, at its present step."""
        self.step = self.trainer.global_step
        return self

    def present_schedulers(self) -> Sequence[Any] | None:
        return None if self._sets_rates else [config.scheduler for config in self.trainer.lr_scheduler_configs]

    @property
    def validates(self) -> bool:
        return bool(self.trainer.enable_validation)

    def logs_later(self, name: str) -> bool:
        """A mean over the epoch is known when the first one has ended, after the validation of its last batch."""
        return self.trainer.current_epoch <= self._first_epoch and not name.startswith("val")

    @property
    def validation_batches(self) -> int | None:
        # Where no validation came yet, Lightning has no numbers of batches.
        private.validation_loaders(self.trainer)
        batches = sum(self.trainer.num_val_batches)
        return int(batches) if 0 < batches < float("inf") and private.is_sequential(self.trainer) else None

    def generators(self) -> Iterable[torch.Generator]:
        loaders = private.validation_loaders(self.trainer)
        return () if loaders is None else generators_of(loaders.flattened)

    def validate(self) -> Mapping[str, float]:
        """Validate for the metrics only."""
        return validate_silently(self.trainer)

    def validate_share(self, most: int) -> Mapping[str, float]:
        return validate_silently(self.trainer, most)

    def record(self, metrics: Mapping[str, float]) -> None:
        for logger in self.trainer.loggers:
            # Lightning, too, logs a validation with the number of the step before it.
            logger.log_metrics(dict(metrics), step=max(0, self.trainer.global_step - 1))

    def tell(self, event: RankEvent) -> None:
        """Call ``on_rank_change(trainer, pl_module, event)`` of every callback that defines it."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            hook = getattr(callback, "on_rank_change", None)
            if hook is not None:
                hook(self.trainer, self.pl_module, event)

    def warn(self, message: str) -> None:
        rank_zero_warn(message)


def run_length(trainer: Trainer, pl_module: LightningModule) -> Run:
    """The length of the run; call it after the data are loaded."""
    if not _steps_are_known(trainer, pl_module):
        return Run(trainer.max_steps if trainer.max_steps > 0 else None)
    total = trainer.estimated_stepping_batches
    # Lightning returns -1 if an epoch has unknown length.
    return Run(int(total) if 0 <= total < float("inf") else None, steps_per_epoch(trainer, pl_module))


def steps_per_epoch(trainer: Trainer, pl_module: LightningModule) -> int | None:
    """The number of optimizer steps in the present epoch; None if it is unknown."""
    batches = trainer.num_training_batches
    if batches == float("inf") or not _steps_are_known(trainer, pl_module):
        return None
    return max(1, -(-int(batches) // trainer.accumulate_grad_batches))


def _steps_are_known(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Whether all steps have the same number of batches.

    Under manual optimization only the module knows how many steps an epoch has. Lightning's own estimate takes the
    number of batches in a step for constant.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    varies = any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks)
    return not varies and pl_module.automatic_optimization
