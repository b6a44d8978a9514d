"""Switching a schedule-free optimizer between the weights that it trains and their average, which is the model."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class ScheduleFreeMode(Callback):
    """Validates, saves and ends with the averaged weights of schedule-free optimizers; leaves other optimizers alone.

    In training the parameters hold the point at which gradients are taken. During validation, in checkpoints and after
    training they hold the average (Defazio et al., arXiv:2405.15682), which is the model. Put this callback before the
    others, so that a resumed run goes on to the same bits. Lightning asks no callback about checkpoints with
    ``weights_only``: one written in the middle of training holds the point of the gradients.
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
        # Switching there and back rounds. The run itself does it here, because one resumed from this checkpoint has to.
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
