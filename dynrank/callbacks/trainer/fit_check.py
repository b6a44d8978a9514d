"""What of a trainer and a module is refused before the first step, because ranks could not change in such a run."""

from __future__ import annotations

from collections.abc import Collection

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from dynrank.callbacks.trainer.averages import averaging_callbacks
from dynrank.callbacks.trainer.strategies import check_setup
from dynrank.change.optimizer_state import check_optimizer
from dynrank.errors import ConfigurationError
from dynrank.layers.finding import adapter_parameters
from dynrank.schedules import How


def check_told(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse manual optimization that makes optimizer steps and never says so.

    Raises:
        ConfigurationError: naming the call.
    """
    if not pl_module.automatic_optimization and trainer.global_step:
        raise ConfigurationError(
            f"{trainer.global_step} optimizer steps of manual optimization, and RankScheduler was told of none, so it "
            "could not change a rank: call scheduler.step(self) in training_step, after the optimizer's step"
        )


def check_fit(trainer: Trainer, pl_module: LightningModule, hows: Collection[How]) -> None:
    """Refuse optimizers, precisions, callbacks and missing validation that changes made as ``hows`` cannot live with.

    Raises:
        ConfigurationError: naming what is wrong and the key that fixes it.
    """
    if hows:
        check_setup(trainer, pl_module)
    if hows and trainer.precision == "16-true":
        raise ConfigurationError(
            "precision=16-true keeps adapters and optimizer state in float16, where Adam's eps of 1e-8 is zero and the "
            "first steps give NaN; set trainer.precision=bf16-true or 16-mixed"
        )
    parameters = adapter_parameters(pl_module)
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    for how in hows:
        for optimizer in trainer.optimizers:
            check_optimizer(optimizer, parameters, how.optimizer_state)
        if scaled and (how.metric == "loss" or how.new_rows == "gradient"):
            raise ConfigurationError(
                "precision=16-mixed scales gradients by a factor that changes, which spoils statistics of them; "
                "set trainer.precision=bf16-mixed, schedule.metric=output or schedule.new_rows=orthogonal"
            )
        if how.max_regression is not None and not trainer.enable_validation:
            raise ConfigurationError(
                f"max_regression={how.max_regression:g} validates before and after a change, and this run has no "
                "validation; give fit() validation data, or set schedule.max_regression=null"
            )


def check_averages(trainer: Trainer) -> None:
    """Refuse an average of a sharded model, which torch would refuse to copy, in other words.

    Raises:
        ConfigurationError: naming the callback and the key that fixes it.
    """
    averages = [type(callback).__name__ for callback in averaging_callbacks(trainer)]
    if averages and isinstance(trainer.strategy, ModelParallelStrategy):
        raise ConfigurationError(
            f"{averages[0]} copies the whole model, which ModelParallelStrategy shards; take it out, or set "
            "trainer.strategy=ddp"
        )
