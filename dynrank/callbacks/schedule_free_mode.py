"""Switching a schedule-free optimizer between the weights that it trains and their average, which is the result."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

# The key of the training point in a checkpoint.
_POINTS = "schedule_free_points"


class ScheduleFreeMode(Callback):
    """Validates, saves and ends with the averaged weights of schedule-free optimizers; ignores other optimizers.

    In training the parameters are the *point* at which gradients are computed. In validations, in checkpoints and after
    training they are the average (Defazio et al., arXiv:2405.15682), which is the result. Computing the average and
    then the point again rounds, so a copy of the point is kept, also in checkpoints: neither they nor validations
    change a bit of the later training. Put this callback before the others. Lightning calls no callback for checkpoints
    with ``weights_only``: if one is written during training, its weights are the point.
    """

    def __init__(self) -> None:
        # While the parameters are the average: {name: the point, from which training continues}.
        self._points: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._points = {}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            # The checkpoint of a finished run has no points.
            self._points = checkpoint.get(_POINTS, {})

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Not earlier, because a run that is resumed after its last step must end with the saved average.
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
        """Keep the points and put the average into the parameters; returns the optimizers that were switched."""
        training = [optimizer for optimizer in _schedule_free(trainer) if optimizer.param_groups[0]["train_mode"]]
        for name, parameter in _trained(training, pl_module):
            self._points[name] = parameter.detach().clone()
        for optimizer in training:
            optimizer.eval()
        return training

    @torch.no_grad()
    def _go_on(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the points into the parameters: the kept ones, otherwise those that the optimizers compute."""
        for optimizer in _schedule_free(trainer):
            optimizer.train()
        for name, point in self._points.items():
            pl_module.get_parameter(name).copy_(point)
        self._points = {}


def _schedule_free(trainer: Trainer) -> list[Any]:
    return [optimizer for optimizer in trainer.optimizers if "train_mode" in optimizer.param_groups[0]]


def _trained(optimizers: list[Any], module: LightningModule) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of all that ``optimizers`` train, for every name of a parameter."""
    trained = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return ((n, p) for n, p in module.named_parameters(remove_duplicate=False) if id(p) in trained)
