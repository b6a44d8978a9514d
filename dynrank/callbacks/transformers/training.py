"""transformers' Trainer as a training run whose ranks change."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch.utils.data import IterableDataset, Subset
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, has_length

from dynrank.distributed.processes import process_count
from dynrank.distributed.wrappers import ddp_modules
from dynrank.driver.event import RankEvent
from dynrank.driver.logged import numbers_in
from dynrank.driver.training import Training
from dynrank.triggers import Run

# What dynrank's names of metrics begin with, where the Trainer's begin with "eval_".
_PREFIX = "val/"


class TrainerTraining(Training):
    """A run of transformers' Trainer.

    Make it when training starts, because it looks through all modules; :meth:`now` is cheap.

    Args:
        trainer: the Trainer, during ``train``.
        event: the arguments of the event by which the Trainer has called a callback.
        evaluate: evaluates the present model; None: ``trainer.evaluate``, if the Trainer has an ``eval_dataset``.
    """

    validate_by = "give the Trainer an eval_dataset, or the callback evaluate=lambda: trainer.evaluate(...)"
    log_by = ""
    knows_schedulers = True

    def __init__(
        self,
        trainer: Trainer,
        event: Mapping[str, Any],
        evaluate: Callable[[], Mapping[str, Any]] | None,
    ) -> None:
        super().__init__(event["model"], [event["optimizer"]], trainer.state.global_step)
        self.ddp = ddp_modules(trainer.model_wrapped)
        self.trainer = trainer
        self._event = event
        self._evaluate = evaluate

    def now(self, event: Mapping[str, Any], steps_uncounted: int = 0) -> TrainerTraining:
        """The run itself, at its present step, in which the Trainer has called a callback with ``event``.

        ``steps_uncounted``: optimizer steps that the Trainer has made and not yet counted.
        """
        self.step = self.trainer.state.global_step + steps_uncounted
        self._event = event
        return self

    def best_is_loaded(self) -> None:
        """Take note that the Trainer has loaded its best checkpoint: the optimizer belongs to the last weights."""
        self.optimizers = []

    def present_schedulers(self) -> Sequence[Any] | None:
        return None if self.trainer.lr_scheduler is None else [self.trainer.lr_scheduler]

    @property
    def limits_are_rates(self) -> bool | None:
        given = self.trainer.args.lr_scheduler_kwargs or {}
        # A scheduler of the user's own was made with other values.
        return "min_lr" in given if given.keys() & {"min_lr", "min_lr_rate"} else None

    @property
    def evaluates(self) -> bool:
        """Whether the Trainer evaluates by itself."""
        return bool(self.trainer.args.eval_strategy != IntervalStrategy.NO)

    def logs_later(self, name: str) -> bool:
        """An evaluation may come before the first of the logs, in which training has its ``loss``."""
        is_of_evaluation = name.startswith(("eval_", _PREFIX))
        logs = self.trainer.args.logging_strategy != IntervalStrategy.NO
        has_logged = any("loss" in record for record in self.trainer.state.log_history)
        return logs and not has_logged and not is_of_evaluation

    @property
    def _evaluation(self) -> Callable[[], Mapping[str, Any]] | None:
        """What evaluates the present model; None: changes cannot be validated."""
        own = None if self.trainer.eval_dataset is None else self.trainer.evaluate
        return self._evaluate or own

    @property
    def validates(self) -> bool:
        return self._evaluation is not None

    def validate(self) -> Mapping[str, float]:
        """Evaluate in addition to the run's own evaluations; no callback is called, and nothing is logged."""
        evaluate = self._evaluation
        # The driver checks `validates` first.
        assert evaluate is not None
        handler = self.trainer.callback_handler
        history = self.trainer.state.log_history
        present = handler.callbacks
        handler.callbacks = []
        logged = len(history)
        try:
            return numeric_metrics(evaluate())
        finally:
            handler.callbacks = present
            del history[logged:]

    def own_name(self, name: str, metrics: Collection[str]) -> str:
        """``eval_loss`` for ``val/loss``, unless the user's own function returns that."""
        own = f"eval_{name.removeprefix(_PREFIX)}"
        return own if name.startswith(_PREFIX) and own in metrics else name

    @property
    def validation_batches(self) -> int | None:
        """Of all the Trainer's evaluation sets; None if one of them has no numbered rows, or others are evaluated."""
        sets = self._evaluation_sets()
        own = (self.trainer.evaluate, self.trainer.get_eval_dataloader)
        if self._evaluate is not None or not all(map(_is_of_transformers, own)):
            return None
        if not sets or not all(has_length(rows) and not isinstance(rows, IterableDataset) for rows in sets.values()):
            return None
        size = int(self.trainer.args.eval_batch_size) * process_count()
        return sum(-(-len(rows) // size) for rows in sets.values())

    def validate_share(self, most: int) -> Mapping[str, float]:
        """As :meth:`validate`, with a share of the rows of the Trainer's evaluation sets."""
        all_rows = self.trainer.eval_dataset
        arguments = self.trainer.args
        persistent = arguments.dataloader_persistent_workers
        assert self.validation_batches is not None
        apart = -(-self.validation_batches // most)
        few = {name: _every(rows, apart) for name, rows in self._evaluation_sets().items()}
        self.trainer.eval_dataset = few if isinstance(all_rows, dict) else few[""]
        # Otherwise the Trainer would keep one loader for these rows and for its own evaluations.
        arguments.dataloader_persistent_workers = False
        try:
            return self.validate()
        finally:
            self.trainer.eval_dataset = all_rows
            arguments.dataloader_persistent_workers = persistent

    def _evaluation_sets(self) -> dict[str, Any]:
        """{name: the rows}; a single set has the name ""."""
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


def _is_of_transformers(method: Callable[..., Any]) -> bool:
    """Whether nobody has written another method in a derived class, or put another function in its place."""
    return hasattr(method, "__func__") and str(method.__module__).startswith("transformers.")


def _every(rows: Any, apart: int) -> Any:
    """Each of the rows that are ``apart``; a Dataset of Hugging Face stays one, because the Trainer prepares it."""
    chosen = range(0, len(rows), apart)
    return rows.select(chosen) if hasattr(rows, "select") else _Rows(rows, chosen)


class _Rows(Subset[Any]):
    """Some rows, with the further attributes of all of them, such as ``classes``."""

    def __getattr__(self, name: str) -> Any:
        # Unpickling asks before there is a dataset.
        if name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)


def numeric_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among ``metrics``; eval_loss is val/loss, too."""
    found = numbers_in(metrics)
    return found | {f"{_PREFIX}{name[5:]}": value for name, value in found.items() if name.startswith("eval_")}


def run_length(args: TrainingArguments, state: TrainerState, dataloader: Any) -> Run:
    """The length of the run."""
    batches = len(dataloader) if has_length(dataloader) else None
    return Run(
        int(state.max_steps), None if batches is None else max(1, -(-batches // args.gradient_accumulation_steps))
    )
