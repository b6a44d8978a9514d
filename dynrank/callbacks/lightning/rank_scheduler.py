"""The Lightning callback that changes ranks during a run by a schedule."""

from collections.abc import Collection, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from dynrank.callbacks.lightning import private
from dynrank.callbacks.lightning.best import (
    forget_best,
    forget_scores_of,
    save_after_end,
    validate_after_end,
    warn_of_other_ranks,
)
from dynrank.callbacks.lightning.checkpoints import follow_sharded_checkpoint
from dynrank.callbacks.lightning.resume import call_hooks_of_ended_run, run_missed_validation
from dynrank.callbacks.lightning.strategies import check_strategy
from dynrank.callbacks.lightning.training import LightningTraining, run_length, steps_per_epoch
from dynrank.callbacks.lightning.validations import logged_by_callbacks, validation_metrics
from dynrank.driver.checks import check_callbacks_metrics, check_validation, checked_metrics
from dynrank.driver.driver import RankDriver
from dynrank.driver.event import History, RankEvent
from dynrank.driver.validation import validate
from dynrank.errors import ConfigurationError
from dynrank.layers.peft_layers import follow_checkpoint_ranks
from dynrank.rank_map import RankMap
from dynrank.schedules import Schedule


class RankScheduler(Callback):
    """Changes the ranks of LoRA layers during training.

    Works in any LightningModule whose model went through :func:`dynrank.add_lora` or PEFT's ``get_peft_model``. Under
    manual optimization, which may have several optimizers, the module must call :meth:`step`. Metrics are read after
    each validation (after each epoch, if nothing is validated). A change is made at the start of a later batch, between
    an optimizer step and the next forward, never with gradients pending; what is due after the last step, at the end.
    When a stage is due, earlier stages that have not acted are skipped. A checkpoint contains everything that a resumed
    run needs, before, during and after a change.

    One scheduler drives one run: a trainer takes one scheduler (lists of stages can be added), and the next run takes a
    new one. A frozen layer keeps its rank.

    If a callback of the trainer defines ``on_rank_change(trainer, pl_module, event)``, this is called after each change
    was made or undone.

    After a change that lowers ranks, the best so far no longer counts: for a ModelCheckpoint with a monitor everything
    later is better, and its files of before are the first to be replaced; EarlyStopping and ReduceLROnPlateau start
    anew. After a change behind the last step, ModelCheckpoints save the changed model, as their best if it is. At the
    end a warning names a best or last checkpoint whose ranks are not the model's.

    A change multiplies the adapters' rate by ``lr_factor`` of the stage's How (an int as schedule: the root of the mean
    rank before / after). Where a param group has adapters alone and schedulers of torch, the rate that is used is then
    in the group. Elsewhere, and from the step on in which the program sets the rate by itself, it is made inside the
    step, and logged as ``lr/adapter``: set rates without the factor.

    Args:
        schedule: an int (``early_budget`` of that rank), a stage, or a list of stages (see :mod:`dynrank.schedules`).
        keep_best_before: whether the best checkpoint may be one from before the last cut, with other ranks; then a
            cut after the last step is in no checkpoint.
        measure: validate directly before and after a change, on a share of the data that costs about 2% of the run at
            most, and put the ``check_monitor`` of the stage's How into the event. Of many changes in a short run none
            is measured; where the length of the run or of the data is unknown, all data are validated.
        rank_map: what the rank of single layers may become, in a model of PEFT as in one of ``add_lora``: {pattern or
            word: a mapping of ``pinned``, ``highest``, ``lowest`` or ``final_rank``}
            (:class:`dynrank.rank_map.RankBounds`), or the path of a YAML file with this mapping below ``rank_pattern``.
            Patterns match as those of PEFT's ``rank_pattern``, the words "attention" and "mlp" mean kinds of layers,
            and the first that matches a layer decides. Where none does, the layer's rule in the rank map of
            ``add_lora`` does, if it has one. Starting ranks and alphas are set where LoRA is added.

    Attributes:
        driver: carries out the schedule in the run.

    Raises:
        ConfigurationError: if a value cannot be used; when training starts, if a pattern matches no layer or only
            layers of others, or bounds contradict the schedule.

    >>> from lightning import Trainer
    >>> scheduler = RankScheduler(4, rank_map={"o_proj": {"pinned": True}, "mlp": {"highest": 8}})
    >>> trainer = Trainer(accelerator="cpu", logger=False, callbacks=[scheduler])
    >>> trainer.callbacks[0].history
    []
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        keep_best_before: bool = False,
        measure: bool = False,
        rank_map: RankMap | None = None,
    ) -> None:
        self.driver = RankDriver(schedule, measure=measure, rank_map=rank_map)
        self.keep_best_before = keep_best_before
        # Whether step() was called since the last batch began, and whether it was ever called.
        self._stepped = self._ever_stepped = False
        # The step at which this fit() began.
        self._first_step = 0
        # The run, from on_train_start to its end.
        self._run: LightningTraining | None = None
        # The metrics of the last validation that module or callbacks may have logged, and whether one was asked for.
        self._shared: set[str] = set()
        self._has_asked = False
        # {metric that steps log: its last value that the driver knows}
        self._seen: dict[str, Any] = {}
        # How many changes were made before the first step of the epoch.
        self._changes_before_epoch = 0
        # Whether an epoch has ended whose means the driver does not know yet.
        self._epoch_has_ended = False

    @property
    def history(self) -> History:
        """Every change of the run so far, and every attempt that was undone, also those before a resume."""
        return self.driver.history

    def step(self, pl_module: LightningModule) -> None:
        """Report, under manual optimization, that an optimizer step was made and that no gradients are pending.

        Call it in ``training_step`` after each optimizer step of the adapter, before its gradients are zeroed. A change
        that is due is made when the next batch starts. Times are counted by ``trainer.global_step``, which counts the
        steps of every optimizer.

        Raises:
            RuntimeError: under automatic optimization, where Lightning reports the steps.
        """
        if pl_module.automatic_optimization:
            raise RuntimeError("scheduler.step(module) is for manual optimization; this module's is automatic")
        self._stepped = self._ever_stepped = True
        self.driver.end_step(self._training)

    def state_dict(self) -> dict[str, Any]:
        if self._run is not None:
            self._log_steps(self._run.trainer)
            self._log_means(self._run.trainer)
        own = {"stepped": self._stepped, "logged_in_steps": sorted(self._seen)}
        own |= {"changes_before_epoch": self._changes_before_epoch, "epoch_has_ended": self._epoch_has_ended}
        return {**self.driver.state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.driver.load_state_dict(state_dict)
        self._stepped = state_dict["stepped"]
        self._seen = dict.fromkeys(state_dict["logged_in_steps"])
        self._changes_before_epoch = state_dict["changes_before_epoch"]
        self._epoch_has_ended = state_dict["epoch_has_ended"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        follow_checkpoint_ranks(pl_module)
        follow_sharded_checkpoint(trainer)
        if stage == "fit":
            _check_callbacks(self, trainer)
            check_strategy(trainer)
            call_hooks_of_ended_run(trainer)
            # So what other callbacks log of a step has the ranks and rates of that step.
            trainer.callbacks = [self, *(c for c in trainer.callbacks if c is not self)]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step = trainer.global_step
        private.load_place_in_data(trainer)
        self._run = LightningTraining(trainer, pl_module)
        # Another fit() of this trainer may have logged these.
        self._seen |= private.step_values(trainer)
        self.driver.start(self._run, run_length(trainer, pl_module))
        # An epoch in which a run is resumed does not begin anew.
        # A batch that an exception has ended, in whose checkpoint it has begun, is not processed.
        of_epoch: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        batches = 0 if trainer.is_last_batch else of_epoch.processed
        begin = trainer.global_step - batches // trainer.accumulate_grad_batches
        self.driver.epoch_begins(trainer.current_epoch, begin, steps_per_epoch(trainer, pl_module))
        if self.driver.progress.observed_step != trainer.global_step:
            if trainer.is_last_batch and not self._epoch_has_ended:
                self._end_epoch_of_before()
            run_missed_validation(trainer, self.driver.logged.values())
        self._end_epoch(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._log_steps(trainer)
            self._forget_scores(trainer, self.driver.logged.of_before_cut())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        metrics = validation_metrics(trainer)
        of_callbacks, self._shared = logged_by_callbacks(trainer, pl_module)
        self._check_callbacks_metrics(of_callbacks)
        if trainer.sanity_checking:
            check_validation(metrics, self.driver.stages, measure=self.driver.measure)
        else:
            self.driver.validated(self._training, metrics)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_epoch(trainer)
        self.driver.epoch_begins(trainer.current_epoch, trainer.global_step, steps_per_epoch(trainer, pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # A search for a rate or a batch size loads a checkpoint at its end; the latter changes the length of the run.
        self.driver.go_on(self._training, run_length(trainer, pl_module) if trainer.global_step == 0 else None)
        # What callbacks have logged after this one's last hook is of before a change that is made here.
        self._log_steps(trainer)
        if pl_module.automatic_optimization:
            between_steps = batch_idx % trainer.accumulate_grad_batches == 0
        else:
            between_steps = self._stepped
            self._stepped = False
        if between_steps:
            self._ask_for_shared()
            self.driver.advance(self._training)
        if batch_idx == 0:
            self._changes_before_epoch = self.driver.logged.changes

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        training = self._training
        # Others may have read a value of before when the last batch ended. After this hook they read the present one.
        self._forget_scores(trainer, self.driver.logged.of_before_cut() & self._seen.keys())
        self._log_steps(trainer)
        if pl_module.automatic_optimization:
            self.driver.end_step(training)
        # Before the step a hook of the module may still set the rate.
        raised = self.driver.raised_adapter_rates(training)
        if raised:
            pl_module.log_dict(raised)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_stepped(pl_module)
        self._log_steps(trainer)
        self._forget_scores(trainer, self.driver.logged.of_before_cut())
        self._epoch_has_ended = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_stepped(pl_module)
        self._end_epoch(trainer)
        before = len(self.history)
        self.driver.finish(self._training)
        if any(not event.undone for event in self.history[before:]):
            validate_after_end(trainer, self, self.driver.logged.values())
            if not self.keep_best_before:
                save_after_end(trainer, self.driver.logged.values())
        if self.history:
            warn_of_other_ranks(trainer, pl_module)

    def on_rank_change(self, trainer: Trainer, pl_module: LightningModule, event: RankEvent) -> None:
        if event.lowers and not self.keep_best_before:
            forget_best(trainer, pl_module, event)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.driver.abort()
        self._run = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # A callback that is kept or copied does not keep the trainer.
        self._run = None

    @property
    def _training(self) -> LightningTraining:
        """The run at its present step."""
        assert self._run is not None
        return self._run.now()

    def _check_callbacks_metrics(self, names: Collection[str]) -> None:
        to_come = self.driver.stages[self.driver.progress.stage :]
        check_callbacks_metrics(names, to_come, measure=self.driver.measure)

    def _ask_for_shared(self) -> None:
        """Refuse a metric that only callbacks log, in a hook that the module has, too, if it shall judge a change.

        One validation as for a change decides, the first time that there is such a metric.
        """
        if not self._shared or self._has_asked:
            return
        to_come = self.driver.stages[self.driver.progress.stage :]
        if not self._shared.isdisjoint(checked_metrics(to_come, measure=self.driver.measure)):
            self._has_asked = True
            self._check_callbacks_metrics(self._shared - validate(self._training).keys())

    def _end_epoch(self, trainer: Trainer) -> None:
        """Take note of the means over an epoch that has ended; in a run without validation triggers read them.

        The module's own ``on_train_epoch_end``, which may log, comes after that of callbacks.
        """
        if self._epoch_has_ended:
            self._log_means(trainer)
            self._epoch_has_ended = False
            if not trainer.enable_validation:
                self.driver.validated(self._training, {})

    def _end_epoch_of_before(self) -> None:
        """End the epoch behind whose last batch the run is resumed: Lightning does not, and forgets the means over it.

        Without validation, triggers take a metric that has the value of a step, too, for the mean.
        """
        self._epoch_has_ended = True
        if not self._training.validates:
            self.driver.logged.read(private.also_means(self._seen))

    def _log_steps(self, trainer: Trainer) -> None:
        """Let the driver know what steps have logged since this was last called."""
        now = private.step_values(trainer)
        new = {name: value for name, value in now.items() if value is not self._seen.get(name)}
        logged = self.driver.logged
        before = {name: logged.value(name) for name in logged.of_before_cut() & new.keys()}
        differ = {name for name, value in before.items() if value != float(new[name])}
        # A hook of the module logs after callbacks have read what was there before.
        self._forget_scores(trainer, differ, before)
        logged.log(new)
        self._seen |= now

    def _log_means(self, trainer: Trainer) -> None:
        """Let the driver know the means over the epoch, if one has ended.

        Of an epoch that only ends after a resume, Lightning knows none.
        """
        if self._epoch_has_ended and trainer.global_step > self._first_step:
            names = private.epoch_means(trainer)
            if not trainer.enable_validation:
                # Triggers read at the end of an epoch, where these are means, too.
                names.update(private.own_names(trainer, on_step=False))
            found = {name: value for name, value in trainer.callback_metrics.items() if name in names}
            self.driver.logged.log(found, self._changes_before_epoch)

    def _forget_scores(
        self, trainer: Trainer, names: Collection[str], values: Mapping[str, float] | None = None
    ) -> None:
        """As :func:`forget_scores_of`, unless scores of before a cut may be the best."""
        if not self.keep_best_before:
            forget_scores_of(trainer, names, values)

    def _check_stepped(self, pl_module: LightningModule) -> None:
        """Refuse manual optimization that makes optimizer steps and never calls :meth:`step`."""
        steps = pl_module.trainer.global_step - self._first_step
        if self.driver.stages and steps and not pl_module.automatic_optimization and not self._ever_stepped:
            raise ConfigurationError(
                f"RankScheduler.step was not called in {steps} optimizer steps of manual optimization, so no rank "
                "could change: call scheduler.step(self) in training_step, after the optimizer's step"
            )


def _check_callbacks(scheduler: RankScheduler, trainer: Trainer) -> None:
    """Refuse a second scheduler of a derived class (Lightning refuses one of the same class), and averages of weights.

    A change of ranks would have to be made in the average, too.
    """
    for callback in trainer.callbacks if scheduler.driver.stages else ():  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
            raise ConfigurationError(
                f"{type(callback).__name__} averages weights of one rank, and the schedule changes ranks: take one of "
                "the two out of callbacks",
                "callbacks",
            )
    others = [c for c in trainer.callbacks if isinstance(c, RankScheduler) and c is not scheduler]  # type: ignore[attr-defined]
    if others:
        raise ConfigurationError(
            f"one scheduler changes the ranks of a run, got {type(scheduler).__name__} and {type(others[0]).__name__} "
            "in callbacks; join their stages in one list, RankScheduler([*first, *second])",
            "callbacks",
        )
