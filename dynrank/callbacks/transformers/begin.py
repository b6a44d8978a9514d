"""Beginning a run of the Trainer: what is refused before the first step, and how its ranks change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import Trainer

from dynrank.adapters.save import trained_heads
from dynrank.callbacks.transformers.checkpoints import is_prepared, prepare_checkpoints
from dynrank.callbacks.transformers.training import TrainerTraining
from dynrank.callbacks.transformers.zero import ZeroTraining, save_live
from dynrank.distributed.accelerated import check_arguments
from dynrank.distributed.processes import process_count
from dynrank.distributed.sharding import is_sharded
from dynrank.driver.driver import RankDriver
from dynrank.driver.slot_notice import slot_notice
from dynrank.errors import ConfigurationError
from dynrank.layers.finding import own_layers


def begin_run(
    trainer: Trainer, event: Mapping[str, Any], evaluate: Callable[[], Mapping[str, Any]] | None
) -> TrainerTraining:
    """The run of ``trainer`` whose training begins with ``event``.

    Raises:
        ConfigurationError: if the callback was added too late; if trained parameters could not be stored; if the
            Trainer's processes do not follow a change.
    """
    check_arguments(trainer.args)
    if not is_prepared(trainer):
        raise ConfigurationError(
            "trainer.add_callback comes too late to prepare the model for checkpoints that can be resumed: call "
            "RankTrainerCallback(...).attach(trainer) instead",
            "callbacks",
        )
    model = event["model"]
    trained_heads(model, own_layers(model))
    prepare_checkpoints(model)
    in_zero = trainer.is_deepspeed_enabled
    if in_zero:
        save_live(model)
    training = (ZeroTraining if in_zero else TrainerTraining)(trainer, event, evaluate)
    if process_count() > 1 and not (training.ddp or in_zero or is_sharded(model)):
        raise ConfigurationError(
            "in several processes ranks change under DDP, FSDP2 or DeepSpeed only; no DDP wraps the model, and none of "
            "the others shards it"
        )
    return training


def print_notice(training: TrainerTraining, driver: RankDriver) -> None:
    """Print what a server will reserve for the adapter at the end, where a schedule can leave it more than the mean."""
    notice = slot_notice(training.model, driver.stages[driver.progress.stage :], driver.rules)
    if notice is not None and training.trainer.is_world_process_zero():
        print(notice)
