"""The checkpoints of transformers' Trainer: of other ranks, of dynrank's layers, and in FSDP2's shards."""

from __future__ import annotations

from functools import partial, wraps
from pathlib import Path
from typing import Any
from weakref import WeakSet

from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import get_last_checkpoint

from dynrank.adapters.save import save_adapter
from dynrank.callbacks.transformers.last_updates import expect_updates
from dynrank.distributed.accelerated import check_arguments, fsdp_plugin
from dynrank.distributed.sharding import shard_frozen, take_saved_ranks
from dynrank.distributed.wrappers import unwrapped_optimizer
from dynrank.layers.finding import own_layers
from dynrank.layers.frozen_base import with_marks_as_tensors, without_base
from dynrank.layers.peft_kernel import apply_lora_kernel
from dynrank.layers.peft_layers import follow_checkpoint_ranks

# The Trainers that are prepared. A callback that kept them itself could not be pickled.
_PREPARED: WeakSet[Trainer] = WeakSet()


def is_prepared(trainer: Trainer) -> bool:
    """Whether :func:`prepare_trainer` was called for ``trainer``."""
    return trainer in _PREPARED


def prepare_trainer(trainer: Trainer, *, kernel: bool) -> None:
    """Check the Trainer's arguments, and prepare its model before it is wrapped or loads a checkpoint.

    So is each model that its ``model_init`` makes later, and a resume from FSDP2's shards. With ``kernel`` PEFT's
    layers compute by the fused op.
    """
    check_arguments(trainer.args)
    prepare_model(trainer.model, kernel=kernel)
    if trainer in _PREPARED:
        return
    _PREPARED.add(trainer)
    if fsdp_plugin() is not None:
        _resume_from_shards(trainer)
    if trainer.model_init is None:
        return
    make = trainer.call_model_init

    # No event comes between this call and the loading of a checkpoint.
    @wraps(make)
    def prepared(*args: Any, **kwargs: Any) -> Any:
        model = make(*args, **kwargs)
        prepare_model(model, kernel=kernel)
        return model

    trainer.call_model_init = prepared


def prepare_model(model: nn.Module, *, kernel: bool) -> None:
    """Prepare ``model`` before it is wrapped, and before a checkpoint is loaded."""
    if kernel:
        apply_lora_kernel(model)
    prepare_checkpoints(model)
    if fsdp_plugin() is not None:
        # accelerate does not shard a model again that is sharded when it is prepared.
        shard_frozen(model)


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


def _resume_from_shards(trainer: Trainer) -> None:
    """Let the Trainer resume from FSDP2's checkpoints, which are loaded into tensors, and under keys, that exist.

    accelerate is imported here, because it is slow and few runs need it.
    """
    from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME

    train = trainer.train
    create_optimizer = trainer.create_optimizer
    create_scheduler = trainer.create_scheduler
    # Of the checkpoint from which train() resumes; None: there is none.
    shards: Path | None = None

    @wraps(train)
    def from_any_ranks(resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        nonlocal shards
        folder: Any = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(trainer.args.output_dir)
        shards = Path(folder) / f"{FSDP_MODEL_NAME}_0" if folder else None
        try:
            return train(resume_from_checkpoint, *args, **kwargs)
        finally:
            shards = None

    # The Trainer calls this when it has the model that it will train, and loads the checkpoint afterwards.
    @wraps(create_optimizer)
    def of_saved_ranks(*args: Any, **kwargs: Any) -> Any:
        if shards is not None and shards.is_dir():
            take_saved_ranks(trainer.model, shards, prefix="model.")
        return create_optimizer(*args, **kwargs)

    # And this when accelerate has prepared the optimizer.
    @wraps(create_scheduler)
    def with_saved_updates(*args: Any, **kwargs: Any) -> Any:
        of_optimizer = shards and shards.with_name(f"{OPTIMIZER_NAME}_0")
        # A checkpoint of the model alone (save_only_model) has none.
        if of_optimizer is not None and of_optimizer.is_dir():
            expect_updates(unwrapped_optimizer(trainer.optimizer), trainer.model, of_optimizer)
        return create_scheduler(*args, **kwargs)

    trainer.train = from_any_ranks
    trainer.create_optimizer = of_saved_ranks
    trainer.create_scheduler = with_saved_updates
