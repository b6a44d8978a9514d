"""Beginning a run of the Trainer: what is refused, and how its ranks change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Trainer

from dynrank.adapters.save import trained_heads
from dynrank.callbacks.transformers.checkpoints import is_prepared, prepare_checkpoints
from dynrank.callbacks.transformers.training import TrainerTraining
from dynrank.callbacks.transformers.zero import ZeroTraining, save_live
from dynrank.driver.training import Evaluate
from dynrank.errors import ConfigurationError
from dynrank.layers.finding import own_layers


def begin_run(trainer: Trainer, event: Mapping[str, Any], evaluate: Evaluate | None) -> TrainerTraining:
    """The run of ``trainer`` whose training begins with ``event``.

    Raises:
        ConfigurationError: if the callback was added too late, or if trained parameters could not be stored.
    """
    if not is_prepared(trainer):
        raise ConfigurationError(
            "trainer.add_callback comes too late to prepare the model for checkpoints that can be resumed: call "
            "RankTrainerCallback(...).attach(trainer) instead",
            "callbacks",
        )
    model = event["model"]
    trained_heads(model, own_layers(model))
    prepare_checkpoints(model)
    if not trainer.is_deepspeed_enabled:
        return TrainerTraining(trainer, event, evaluate)
    save_live(model)
    return ZeroTraining(trainer, event, evaluate)
