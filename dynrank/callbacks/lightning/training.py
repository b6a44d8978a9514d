"""Lightning's Trainer as a training run whose ranks change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dynrank.callbacks.lightning import private
from dynrank.callbacks.lightning.validation import validate
from dynrank.distributed.wrappers import ddp_modules
from dynrank.driver.event import RankEvent
from dynrank.driver.metrics import TRAIN_LOSS
from dynrank.driver.training import Evaluate, Training
from dynrank.errors import ConfigurationError
from dynrank.triggers import Run


class LightningTraining(Training):
    """A run of Lightning's Trainer.

    Make it when training starts, because it looks through all modules; :meth:`now` is cheap.

    Args:
        trainer: the trainer, in ``fit``.
        pl_module: the module that it trains.
        evaluate: evaluates the present model for a change; None: the module's validation steps do.
    """

    validate_by = "give fit() validation data, in sequential loaders, or RankScheduler(…, evaluate=…) a function"

    def __init__(self, trainer: Trainer, pl_module: LightningModule, evaluate: Evaluate | None = None) -> None:
        super().__init__(pl_module, trainer.optimizers, trainer.global_step)
        # The trainer's model is wrapped by DDP.
        self.ddp = ddp_modules(trainer.strategy.model or pl_module)
        self.trainer = trainer
        self.pl_module = pl_module
        self._evaluate = evaluate
        self._first_step = trainer.global_step

    def now(self) -> LightningTraining:
        """The run itself, at its present step."""
        self.step = self.trainer.global_step
        return self

    def check_is_stepped(self) -> None:
        """Refuse manual optimization that makes optimizer steps and never reports one."""
        steps = self.trainer.global_step - self._first_step
        if steps and not self.pl_module.automatic_optimization:
            raise ConfigurationError(
                f"RankScheduler.step was not called in {steps} optimizer steps of manual optimization, so no rank "
                "could change: call scheduler.step(self) in training_step, after the optimizer's step"
            )

    @property
    def validates(self) -> bool:
        own = bool(self.trainer.enable_validation) and private.is_sequential(self.trainer)
        return self._evaluate is not None or own

    def validate(self) -> Mapping[str, Any]:
        return validate(self.trainer, self.pl_module) if self._evaluate is None else self._evaluate()

    def tell(self, event: RankEvent) -> None:
        """Call ``on_rank_change(trainer, pl_module, event)`` of every callback that defines it."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            hook = getattr(callback, "on_rank_change", None)
            if hook is not None:
                hook(self.trainer, self.pl_module, event)

    def warn(self, message: str) -> None:
        rank_zero_warn(message)


def loss_of(outputs: Any, trainer: Trainer, pl_module: LightningModule) -> Tensor | None:
    """The loss in what ``training_step`` has returned, as ``on_train_batch_end`` gets it; None: it skips the batch."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if isinstance(loss, Tensor):
        # Lightning divides it for the accumulation of gradients.
        return loss.detach() * (trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1)
    if not pl_module.automatic_optimization:
        raise ConfigurationError(
            f"a trigger reads {TRAIN_LOSS}, and training_step of this manual optimization returns no loss; return it, "
            "or observe a metric of validations"
        )
    return None


def is_last_step(trainer: Trainer) -> bool:
    """Whether no batch follows the one that ends now, unless something stops the run earlier."""
    if trainer.max_steps > 0 and trainer.global_step >= trainer.max_steps:
        return True
    return trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs


def run_length(trainer: Trainer, pl_module: LightningModule) -> Run:
    """The length of the run; call it after the data are loaded."""
    if not _steps_are_known(trainer, pl_module):
        return Run(trainer.max_steps if trainer.max_steps > 0 else None)
    total = trainer.estimated_stepping_batches
    batches = trainer.num_training_batches
    # Epochs whose loaders are made anew may have other lengths.
    varies = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
    is_fixed = batches != float("inf") and not varies
    epoch = max(1, -(-int(batches) // trainer.accumulate_grad_batches)) if is_fixed else None
    # Lightning returns -1 if an epoch has unknown length.
    return Run(int(total) if 0 <= total < float("inf") else None, epoch)


def _steps_are_known(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Whether all steps have the same number of batches.

    Under manual optimization only the module knows how many steps an epoch has. Lightning's own estimate takes the
    number of batches in a step for constant.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    varies = any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks)
    return not varies and pl_module.automatic_optimization
