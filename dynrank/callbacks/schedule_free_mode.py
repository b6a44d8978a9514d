"""Switching a schedule-free optimizer between the weights that it trains and their average, which is the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

# The key in a checkpoint.
_POINTS = "schedule_free_points"


class ScheduleFreeMode(Callback):
    """Validates, saves and ends with the averaged weights of schedule-free optimizers; leaves other optimizers alone.

    In training the parameters hold the point at which gradients are taken. During validation, in checkpoints and after
    training they hold the average (Defazio et al., arXiv:2405.15682), which is the model. Going there and back rounds,
    so the point is kept meanwhile, and in checkpoints: neither they nor validations change a bit of what follows. Put
    this callback before the others. Lightning asks no callback about checkpoints with ``weights_only``: one written in
    the middle of training holds the point of the gradients.
    """

    def __init__(self) -> None:
        # The points to go on from, by name, while the parameters hold the average.
        self._points: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._points = {}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            # A run that has ended left no points.
            self._points = checkpoint.get(_POINTS, {})

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Not sooner, because a run that is resumed behind its last step ends with what was saved.
        self._go_on(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._average(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and self._points:
            self._go_on(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._average(trainer, pl_module)
        # The points are dropped, because a change of ranks may follow.
        self._points = {}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        switched = self._average(trainer, pl_module)
        if self._points:
            checkpoint[_POINTS] = self._points
        if switched:
            for name, parameter in _trained(switched, pl_module):
                if name in checkpoint["state_dict"]:
                    checkpoint["state_dict"][name] = parameter.detach().clone()
            for optimizer, state in zip(trainer.optimizers, checkpoint["optimizer_states"], strict=True):
                for group in state["param_groups"] if optimizer in switched else ():
                    group["train_mode"] = False
            self._go_on(trainer, pl_module)

    def _average(self, trainer: Trainer, pl_module: LightningModule) -> list[Any]:
        """Put the average into the parameters and keep the points; the optimizers of which that was not so already."""
        training = [optimizer for optimizer in _schedule_free(trainer) if optimizer.param_groups[0]["train_mode"]]
        for name, parameter in _trained(training, pl_module):
            self._points[name] = parameter.detach().clone()
        for optimizer in training:
            optimizer.eval()
        return training

    @torch.no_grad()
    def _go_on(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the points into the parameters: those that were kept, else as the optimizers compute them."""
        for optimizer in _schedule_free(trainer):
            optimizer.train()
        for name, point in self._points.items():
            pl_module.get_parameter(name).copy_(point)
        self._points = {}


def _schedule_free(trainer: Trainer) -> list[Any]:
    return [optimizer for optimizer in trainer.optimizers if "train_mode" in optimizer.param_groups[0]]


def _trained(optimizers: list[Any], module: LightningModule) -> Iterator[tuple[str, nn.Parameter]]:
    """What ``optimizers`` train, by every name that it has."""
    trained = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return ((n, p) for n, p in module.named_parameters(remove_duplicate=False) if id(p) in trained)
