"""Switching a schedule-free optimizer between the weights that it trains and their average, which is the result."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class ScheduleFreeMode(Callback):
    """Validates and ends with the averaged weights of schedule-free optimizers; ignores other optimizers.

    In training, and so in checkpoints, the parameters are the *point* at which gradients are computed. In validations
    and after training they are the average (Defazio et al., arXiv:2405.15682), which is the result; for the average of
    a checkpoint, load it with its optimizer and call ``optimizer.eval()``. Put this callback before the others.
    """

    def __init__(self) -> None:
        # Those that return to training after the present validation.
        self._paused: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        for optimizer in _schedule_free(trainer):
            optimizer.train()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A validation before the first or after the last step has the average already.
        self._paused = [optimizer for optimizer in _schedule_free(trainer) if optimizer.param_groups[0]["train_mode"]]
        for optimizer in self._paused:
            optimizer.eval()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in self._paused:
            optimizer.train()
        self._paused = []

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in _schedule_free(trainer):
            optimizer.eval()


def _schedule_free(trainer: Trainer) -> list[Any]:
    return [optimizer for optimizer in trainer.optimizers if "train_mode" in optimizer.param_groups[0]]
