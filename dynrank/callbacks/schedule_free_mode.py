"""Switching a schedule-free optimizer between the weights it trains and the weights it stands for."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class ScheduleFreeMode(Callback):
    """Validates, checkpoints and leaves the averaged weights of schedule-free optimizers; others are left alone.

    Between batches the parameters hold the point at which gradients are taken. They hold the average (Defazio et al.,
    arXiv:2405.15682), which is the model, during validation, in checkpoints and after training. Put it before other
    callbacks, so that a resumed run goes on to the same bits. Lightning tells callbacks nothing of checkpoints with
    ``weights_only``: those written in the middle of training hold the former point.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _switch(trainer, "train")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _switch(trainer, "eval")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            _switch(trainer, "train")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _switch(trainer, "eval")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        training = [optimizer for optimizer in _schedule_free(trainer) if optimizer.param_groups[0]["train_mode"]]
        if not training:
            return
        # The way there and back rounds: the run itself goes it too, as one that is resumed from here has to.
        _switch(trainer, "eval")
        trained = {id(p) for optimizer in training for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in pl_module.named_parameters(remove_duplicate=False):
            if id(parameter) in trained and name in checkpoint["state_dict"]:
                checkpoint["state_dict"][name] = parameter.detach().clone()
        for index, optimizer in enumerate(trainer.optimizers):
            if optimizer in training:
                for group in checkpoint["optimizer_states"][index]["param_groups"]:
                    group["train_mode"] = False
        _switch(trainer, "train")


def _schedule_free(trainer: Trainer) -> list[Any]:
    return [optimizer for optimizer in trainer.optimizers if "train_mode" in optimizer.param_groups[0]]


def _switch(trainer: Trainer, mode: str) -> None:
    for optimizer in _schedule_free(trainer):
        getattr(optimizer, mode)()
