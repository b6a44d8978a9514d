"""The checkpoints of transformers' Trainer: of other ranks, of dynrank's layers, and in FSDP2's shards."""

from __future__ import annotations

from functools import partial, wraps
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import get_last_checkpoint

from dynrank.adapters.save import save_adapter
from dynrank.distributed.sharding import take_saved_ranks
from dynrank.driver.learning_rates import mark
from dynrank.layers.finding import own_layers
from dynrank.layers.frozen_base import with_marks_as_tensors, without_base
from dynrank.layers.peft_layers import follow_checkpoint_ranks


def prepare_checkpoints(model: nn.Module) -> None:
    """Let ``model`` load checkpoints of other ranks; one of :func:`dynrank.add_lora` saves itself so that they fit."""
    follow_checkpoint_ranks(model)
    if own_layers(model) and hasattr(model, "save_pretrained"):
        model.save_pretrained = partial(_save_with_adapter, model)  # type: ignore[assignment]


def _save_with_adapter(model: Any, folder: str | Path, **options: Any) -> None:
    """Save what the Trainer resumes from, and the adapter in PEFT's format."""
    adapted = bool(own_layers(model))
    if adapted and isinstance(model, PreTrainedModel):
        state = without_base(model, options.get("state_dict") or model.state_dict(), trained=())
        # The Trainer loads by the model's own names, to which it does not translate those of transformers' files.
        options |= {"state_dict": with_marks_as_tensors(state), "save_original_format": False}
    type(model).save_pretrained(model, folder, **options)
    if adapted and options.get("is_main_process", True):
        save_adapter(model, folder)


def resume_from_shards(trainer: Trainer) -> None:
    """Let the Trainer resume from FSDP2's checkpoints, which are loaded into tensors, and under keys, that exist.

    accelerate is imported here, because it is slow and few runs need it.
    """
    from accelerate.utils.constants import FSDP_MODEL_NAME

    train = trainer.train

    @wraps(train)
    def from_any_ranks(resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        folder: Any = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(trainer.args.output_dir)
        if folder:
            shards = Path(folder) / f"{FSDP_MODEL_NAME}_0"
            if shards.is_dir():
                take_saved_ranks(trainer.model, shards, prefix="model.")
            mark(trainer.create_optimizer())
        return train(resume_from_checkpoint, *args, **kwargs)

    trainer.train = from_any_ranks
