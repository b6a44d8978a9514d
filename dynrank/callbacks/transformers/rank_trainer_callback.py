"""The callback that changes ranks in transformers' Trainer (and TRL's trainers, which derive from it)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import ref

from torch import nn
from transformers import Trainer, TrainerState
from transformers.trainer_callback import ExportableState, TrainerCallback

from dynrank.callbacks.transformers.begin import begin_run
from dynrank.callbacks.transformers.best import forget_best
from dynrank.callbacks.transformers.checkpoints import prepare_trainer
from dynrank.callbacks.transformers.last_updates import LastUpdates, with_updates, without_updates
from dynrank.callbacks.transformers.metrics import Metrics
from dynrank.callbacks.transformers.trainer import calling_trainer
from dynrank.callbacks.transformers.training import TrainerTraining, run_length
from dynrank.driver.driver import RankDriver
from dynrank.driver.event import RankEvent
from dynrank.driver.metrics import TRAIN_LOSS, check_observed
from dynrank.driver.notices import start_notices
from dynrank.driver.training import Evaluate
from dynrank.driver.validation import validating_change
from dynrank.layers.finding import lora_layers
from dynrank.output.console import print_table
from dynrank.output.ranks import rank_totals
from dynrank.rank_map import RankMap
from dynrank.schedules import Schedule


class RankTrainerCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Changes the ranks of LoRA layers during ``transformers.Trainer.train``, in one process or in several.

    Pass it to the Trainer's constructor (``callbacks=[...]``), or a Trainer that is made already to :meth:`attach`;
    ``trainer.add_callback`` alone is refused. Changes are made before the first batch of an optimizer step; what is due
    at the end of the run, in the last step, before the last evaluation and checkpoint.

    Metrics have the Trainer's names, ``Plateau("eval_f1")``, and ``val/loss`` is ``eval_loss``. Triggers read those of
    each evaluation, and ``train/loss``: the mean of the losses that were logged since the last one, or since ranks have
    changed. Where the Trainer does not evaluate, they read it at each log. After a change that lowers
    ranks, the best so far no longer counts: ``state.best_metric`` and ``best_model_checkpoint`` are empty until the
    next evaluation; EarlyStoppingCallback and ``reduce_lr_on_plateau`` start anew.

    ``rank/mean``, ``rank/max`` and ``rank/parameters`` are logged at the start and at each change, and ``lr/adapter``
    with each loss, if changes have raised the adapters' rate. Callbacks with ``on_rank_change(args, state, control,
    event, **kwargs)`` are called after each change and each undo. A Trainer with a ``model_init`` begins the schedule
    anew in each ``train()`` and trial of a search.

    Args:
        schedule: as in :class:`dynrank.callbacks.RankScheduler`.
        evaluate: as in RankScheduler; None: the Trainer's ``evaluation_loop``, of which only progress bars hear.
        keep_best_before: let the best so far, which may have higher ranks, still count: then none of these starts anew.
        rank_map: as in RankScheduler.
        kernel: as in RankScheduler.

    Attributes:
        driver: carries out the schedule in the run.

    Raises:
        ConfigurationError: if a value cannot be used; when training starts, if ``rank_map`` does not fit.

    >>> RankTrainerCallback(4).history
    []
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        evaluate: Evaluate | None = None,
        keep_best_before: bool = False,
        rank_map: RankMap | None = None,
        kernel: bool = False,
    ) -> None:
        self.driver = RankDriver(schedule, rank_map=rank_map)
        self.evaluate = evaluate
        self.keep_best_before = keep_best_before
        self.kernel = kernel
        # The model of the last run, as long as somebody has it.
        self._last_model: ref[nn.Module] | None = None
        # From attach() on, or while it trains; and the run, while it trains.
        self.trainer: Trainer | None = None
        self._run: TrainerTraining | None = None
        self._metrics = Metrics()
        self._updates = LastUpdates(self.driver)

    @property
    def history(self) -> list[RankEvent]:
        """Every change of the run so far, and every attempt that was undone, also those before a resume."""
        return self.driver.history

    def attach(self, trainer: Trainer) -> RankTrainerCallback:
        """Add the callback to a Trainer that is made already, with all that the constructor's ``callbacks`` gives it.

        Returns:
            The callback itself: ``ranks = RankTrainerCallback(4).attach(trainer)``.
        """
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        self.trainer = trainer
        prepare_trainer(trainer, kernel=self.kernel)
        return self

    def on_init_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        prepare_trainer(calling_trainer(), kernel=self.kernel)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # After attach() the Trainer is known. Its state tells it from another one that has the same callback.
        if self.trainer is None or self.trainer.state is not state:
            self.trainer = calling_trainer()
        training = self._run = begin_run(self.trainer, kwargs, self.evaluate)
        if self.trainer.eval_dataset is None:
            check_observed(self.driver.stages, [TRAIN_LOSS])
        self._load(state, training)
        self._last_model = ref(training.model)
        self.driver.start(training, run_length(args, state, kwargs["train_dataloader"]))
        self._metrics.begin(state)
        to_come = self.driver.stages[self.driver.progress.stage :]
        for notice in start_notices(training.model, to_come, self.driver.rules) if state.is_world_process_zero else ():
            print(notice)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        training = self._training(kwargs)
        # Not earlier, because the callbacks that write logs begin after this one.
        if self._metrics.step_begins():
            training.log(rank_totals(training.model))
        self._observe(training)
        self.driver.advance(training)

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # The Trainer increments its step count after this event.
        self.driver.end_step(self._training(kwargs, steps_uncounted=1), last=False)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            self.driver.end(self._training(kwargs))

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any, **kwargs: Any) -> None:
        if self._run is not None and "loss" in logs:
            self._metrics.log(logs["loss"], state, self.driver, evaluates=self._run.evaluates)
            if rates := self.driver.adapter_rates:
                self._training(kwargs).log(rates)

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, metrics: Any, **_: Any) -> None:
        # The function of a user may evaluate by the Trainer.
        if self._run is not None and not validating_change():
            self._metrics.evaluated(metrics, self.driver.monitors)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        training = self._training(kwargs)
        self._observe(training)
        if args.load_best_model_at_end:
            training.best_is_loaded()
        self.driver.finish(training)
        self._run = None

    def on_rank_change(self, args: Any, state: TrainerState, control: Any, event: RankEvent, **_: Any) -> None:
        assert self._run is not None
        if not event.undone:
            self._metrics.forget_loss()
            self._run.log(rank_totals(self._run.model))
        if state.is_world_process_zero:
            print_table(event.table({name: layer.rank for name, layer in lora_layers(self._run.model)}))
        if event.lowers and not self.keep_best_before:
            forget_best(self._run.trainer, event)

    def _training(self, event: Mapping[str, Any], steps_uncounted: int = 0) -> TrainerTraining:
        """The run at its present step."""
        assert self._run is not None
        return self._run.now(event, steps_uncounted)

    def _observe(self, training: TrainerTraining) -> None:
        """Let triggers read the evaluations since the last step together: each event had one data set."""
        if metrics := self._metrics.look():
            self.driver.validated(training, metrics)

    def state(self) -> dict[str, Any]:
        """The state for ``trainer_state.json``, in plain values."""
        driver = without_updates(self.driver.state_dict())
        return {"args": {}, "attributes": {"driver": driver, "metrics": self._metrics.state_dict()}}

    def _load(self, state: TrainerState, training: TrainerTraining) -> None:
        """Take the state of a checkpoint if the run is resumed; a run with another model begins anew."""
        updates = self._updates.begin(training)
        model = training.model
        if state.global_step:
            stored = (state.stateful_callbacks or {}).get(type(self).__name__, {})
            attributes = stored.get("attributes", {})
            # The last training may have ended without its event, by an error.
            self.driver.abort()
            self.driver.load_state_dict(with_updates(attributes.get("driver", {}), updates))
            self._metrics.load_state_dict(attributes["metrics"])
            return
        self._metrics = Metrics()
        if training.trainer.model_init is not None and (self._last_model is None or model is not self._last_model()):
            self.driver.reset()
