"""transformers' Trainer as a training run whose ranks change, and its checkpoints, also in FSDP2's shards."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Subset
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import get_last_checkpoint, has_length

from dynrank.adapters.save import save_adapter
from dynrank.distributed.processes import process_count
from dynrank.distributed.sharding import take_saved_ranks
from dynrank.distributed.wrappers import ddp_modules
from dynrank.driver.event import RankEvent
from dynrank.driver.rates import mark
from dynrank.driver.training import Training
from dynrank.layers.finding import lora_layers, own_layers
from dynrank.layers.frozen_base import with_marks_as_tensors, without_base
from dynrank.layers.peft_layers import follow_checkpoint_ranks


class HFTraining(Training):
    """The present state of a run of transformers' Trainer; made anew for each event.

    Args:
        trainer: the Trainer, during ``train``.
        event: the arguments of the event by which the Trainer has called a callback.
        evaluate: evaluates the present model; None: changes cannot be validated.
        logged: the last value of every metric.
        steps_uncounted: optimizer steps that the Trainer has made and not yet counted.
    """

    validate_by = "give the Trainer an eval_dataset, or the callback evaluate=lambda: trainer.evaluate(...)"

    def __init__(
        self,
        trainer: Trainer,
        event: Mapping[str, Any],
        evaluate: Callable[[], Mapping[str, Any]] | None,
        logged: Mapping[str, float],
        steps_uncounted: int = 0,
    ) -> None:
        scheduler = event.get("lr_scheduler")
        schedulers = None if scheduler is None else [scheduler]
        step = trainer.state.global_step + steps_uncounted
        super().__init__(event["model"], [event["optimizer"]], step, schedulers=schedulers)
        self.ddp = ddp_modules(trainer.model_wrapped)
        self.trainer = trainer
        self._event = event
        self._evaluate = evaluate
        self._logged = logged

    def logged(self) -> Mapping[str, float]:
        return self._logged

    @property
    def validates(self) -> bool:
        return self._evaluate is not None

    def validate(self) -> Mapping[str, float]:
        """Evaluate in addition to the run's own evaluations; no callback is called, and nothing is logged."""
        # The driver checks `validates` first.
        assert self._evaluate is not None
        handler = self.trainer.callback_handler
        history = self.trainer.state.log_history
        present = handler.callbacks
        handler.callbacks = []
        logged = len(history)
        try:
            return numbers(self._evaluate())
        finally:
            handler.callbacks = present
            del history[logged:]

    @property
    def validation_batches(self) -> int | None:
        """Of all the Trainer's evaluation sets; None if one of them has no length."""
        sets = self._evaluation_sets()
        if not sets or not all(map(has_length, sets.values())):
            return None
        size = int(self.trainer.args.eval_batch_size) * process_count()
        return sum(-(-len(rows) // size) for rows in sets.values())

    def validate_share(self, most: int) -> Mapping[str, float]:
        """As :meth:`validate`, with a share of the rows of the Trainer's evaluation sets."""
        whole = self.trainer.eval_dataset
        arguments = self.trainer.args
        persistent = arguments.dataloader_persistent_workers
        assert self.validation_batches is not None
        apart = -(-self.validation_batches // most)
        few = {name: _every(rows, apart) for name, rows in self._evaluation_sets().items()}
        self.trainer.eval_dataset = few if isinstance(whole, dict) else few[""]
        # Otherwise the Trainer would keep one loader for these rows and for its own evaluations.
        arguments.dataloader_persistent_workers = False
        try:
            return self.validate()
        finally:
            self.trainer.eval_dataset = whole
            arguments.dataloader_persistent_workers = persistent

    def _evaluation_sets(self) -> dict[str, Any]:
        """{name: the rows}; one set alone has the name ""."""
        rows = self.trainer.eval_dataset
        if isinstance(rows, dict):
            return rows
        return {} if rows is None else {"": rows}

    def log(self, values: Mapping[str, float]) -> None:
        """Log ``values`` as the Trainer logs its own."""
        state = self.trainer.state
        logs = {**values} if state.epoch is None else {**values, "epoch": state.epoch}
        state.log_history.append({**logs, "step": self.step})
        self.trainer.callback_handler.on_log(self.trainer.args, state, self.trainer.control, logs)

    def tell(self, event: RankEvent) -> None:
        """Call ``on_rank_change`` of every callback that defines it."""
        trainer = self.trainer
        for callback in trainer.callback_handler.callbacks:
            hook = getattr(callback, "on_rank_change", None)
            if hook is not None:
                hook(trainer.args, trainer.state, trainer.control, event=event, **self._event)


def _every(rows: Any, apart: int) -> Any:
    """Each of the rows that are ``apart``; a Dataset of Hugging Face stays one, because the Trainer prepares it."""
    chosen = range(0, len(rows), apart)
    return rows.select(chosen) if hasattr(rows, "select") else Subset(rows, chosen)


def calling_trainer() -> Trainer:
    """The Trainer that is calling this event."""
    # Neither an event's arguments nor any public method of a callback leads to the Trainer (transformers 5.24), and
    # callbacks are made before it is. Without its list of callbacks, changes could not be logged or told to others.
    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer):
            return found
        frame = frame.f_back
    raise RuntimeError("the events of RankTrainerCallback have to be called by transformers' Trainer")


def ranks_of(model: nn.Module) -> list[int]:
    """The rank of each LoRA layer."""
    return [layer.rank for _, layer in lora_layers(model)]


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among ``metrics``; eval_loss is val/loss, too."""
    found = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
    return found | {f"val/{name[5:]}": value for name, value in found.items() if name.startswith("eval_")}


def follow(model: nn.Module) -> None:
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


def resume_from_shards() -> None:
    """Let the Trainer resume from FSDP2's checkpoints, which are loaded into tensors, and under keys, that exist.

    What needs accelerate is imported here, because it is installed only if transformers' Trainer is used.
    """
    from accelerate.utils.constants import FSDP_MODEL_NAME

    trainer: Any = calling_trainer()
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
