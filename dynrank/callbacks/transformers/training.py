"""transformers' Trainer as a training run whose ranks change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, has_length

from dynrank.distributed.wrappers import ddp_modules
from dynrank.driver.event import RankEvent
from dynrank.driver.metrics import numbers_in
from dynrank.driver.training import Evaluate, Training
from dynrank.triggers import Run


class TrainerTraining(Training):
    """A run of transformers' Trainer.

    Make it when training starts, because it looks through all modules; :meth:`now` is cheap.

    Args:
        trainer: the Trainer, during ``train``.
        event: the arguments of the event by which the Trainer has called a callback.
        evaluate: evaluates the present model; None: the Trainer's ``evaluation_loop``, if it has an ``eval_dataset``.
    """

    validate_by = (
        "give the Trainer an eval_dataset, or the callback evaluate=lambda: trainer.evaluate(...), which "
        "predict_with_generate needs"
    )

    def __init__(self, trainer: Trainer, event: Mapping[str, Any], evaluate: Evaluate | None) -> None:
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

    @property
    def evaluates(self) -> bool:
        """Whether the Trainer evaluates by itself."""
        return bool(self.trainer.args.eval_strategy != IntervalStrategy.NO)

    @property
    def validates(self) -> bool:
        # How a Seq2SeqTrainer generates is known to its own evaluate() alone.
        generates = getattr(self.trainer.args, "predict_with_generate", False)
        return self._evaluate is not None or (self.trainer.eval_dataset is not None and not generates)

    def validate(self) -> Mapping[str, Any]:
        """Evaluate by the Trainer's public loop, which logs nothing; to callbacks it is a prediction."""
        if self._evaluate is not None:
            return with_own_names(self._evaluate())
        trainer = self.trainer
        rows = trainer.eval_dataset
        prefixes = {name: f"eval_{name}" for name in rows} if isinstance(rows, dict) else {None: "eval"}
        # Without a function of metrics nobody needs the logits.
        loss_only = True if trainer.compute_metrics is None else None
        metrics: dict[str, Any] = {}
        for name, prefix in prefixes.items():
            loader = trainer.get_eval_dataloader(name)
            output = trainer.evaluation_loop(
                loader, "Validation for a change of rank", prediction_loss_only=loss_only, metric_key_prefix=prefix
            )
            metrics |= output.metrics
        # So a progress bar of the prediction is closed.
        trainer.callback_handler.on_predict(trainer.args, trainer.state, trainer.control, metrics)
        return with_own_names(metrics)

    def log(self, values: Mapping[str, float]) -> None:
        """Log ``values`` in a record of their own, beside the Trainer's: ``trainer.log`` may add to them, as TRL's."""
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


def with_own_names(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among ``metrics``; eval_loss is val/loss, too."""
    found = numbers_in(metrics)
    return found | {f"val/{name[5:]}": value for name, value in found.items() if name.startswith("eval_")}


def run_length(args: TrainingArguments, state: TrainerState, dataloader: Any) -> Run:
    """The length of the run."""
    batches = len(dataloader) if has_length(dataloader) else None
    return Run(
        int(state.max_steps), None if batches is None else max(1, -(-batches // args.gradient_accumulation_steps))
    )
