"""Refusing a trainer, a module or its metrics before the first step, because the schedule could not be carried out."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lightning.pytorch import LightningModule, Trainer

from dynrank.change.optimizer_state import check_optimizer
from dynrank.distributed.sharding import sharded_error, sharded_layers
from dynrank.driver.driver import RankDriver
from dynrank.driver.metrics import checked, not_logged, watched
from dynrank.errors import ConfigurationError
from dynrank.layers.finding import adapter_parameters
from dynrank.schedules import How


def check_fit(trainer: Trainer, pl_module: LightningModule, hows: Collection[How]) -> None:
    """Refuse sharded adapters, and optimizers and precisions that changes made as ``hows`` cannot live with.

    Raises:
        ConfigurationError: naming what is wrong and the key that fixes it.
    """
    if not hows:
        return
    sharded = sharded_layers(pl_module)
    if sharded:
        raise sharded_error(sharded)
    if trainer.precision == "16-true":
        raise ConfigurationError(
            "precision=16-true keeps adapters and optimizer state in float16, where Adam's eps of 1e-8 is zero and the "
            "first steps give NaN; set trainer.precision=bf16-true or 16-mixed"
        )
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    for how in hows:
        for optimizer in trainer.optimizers:
            check_optimizer(optimizer, adapter_parameters(pl_module), how.optimizer_state)
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


def check_sanity(driver: RankDriver, logged: Mapping[str, float]) -> None:
    """Refuse a schedule that reads a metric of the validation which the sanity validation has not logged.

    A trigger may also watch what only training logs: a name counts as one of the validation if it begins as those do
    that it logs (``val/``).

    Raises:
        ConfigurationError: naming the metric, the argument that names it, and what is logged.
    """
    groups = {name.partition("/")[0] for name in logged if "/" in name}
    asked = {name: what for name, what in watched(driver.stages).items() if name.partition("/")[0] in groups}
    for name, argument in (asked | checked(driver.hows)).items():
        if name not in logged:
            error = not_logged(name, argument, logged)
            raise ConfigurationError(f"{error}; if later validations log it, set num_sanity_val_steps=0")


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
