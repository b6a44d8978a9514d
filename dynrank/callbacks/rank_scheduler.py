"""The Lightning callback that changes ranks during a run by a schedule."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden

from dynrank.callbacks.lightning import private
from dynrank.callbacks.lightning.best import forget_best, save_after_end, warn_of_other_ranks
from dynrank.callbacks.lightning.loops import end_in_full, run_missed_validation, validate_beside, validation_metrics
from dynrank.callbacks.lightning.strategies import check_strategy, follow_sharded_checkpoint
from dynrank.distributed.wrappers import ddp_modules
from dynrank.driver.check import check_validation
from dynrank.driver.driver import RankDriver
from dynrank.driver.event import RankEvent
from dynrank.driver.training import Training
from dynrank.errors import ConfigurationError
from dynrank.layers.peft_layers import follow_checkpoint_ranks
from dynrank.schedules import Schedule
from dynrank.triggers import Run


class RankScheduler(Callback):
    """Changes the ranks of LoRA layers during training.

    Works in any LightningModule whose model went through :func:`dynrank.add_lora` or PEFT's ``get_peft_model``. Under
    manual optimization, which may have several optimizers, the module must call :meth:`step`. Metrics are read after
    each validation (after each epoch, if nothing is validated). A change is made at the start of a later batch, between
    an optimizer step and the next forward, never with gradients pending. When a stage is due, earlier stages that have
    not acted are skipped. A checkpoint contains everything that a resumed run needs, before, during and after a change.

    A layer with its own final rank (rank map) is never shrunk below it and gets it in the last stage; a pinned layer
    never changes, and a frozen one keeps its rank. One scheduler drives one run: a trainer takes one scheduler (lists
    of stages can be added), and the next run takes a new one.

    If a callback of the trainer defines ``on_rank_change(trainer, pl_module, event)``, this is called after each change
    was made or undone.

    After a change that lowers ranks, the best so far no longer counts: for a ModelCheckpoint with a monitor everything
    later is better, and its files of before are the first to be replaced; EarlyStopping starts anew. After a change
    behind the last step, ModelCheckpoints save the changed model as their best and last. At the end a warning names a
    best or last checkpoint whose ranks are not the model's.

    If an adapter shares its param group with other parameters and a change raises its rate, the rate is logged as
    ``lr/adapter``; elsewhere the group and its scheduler have the rate that is used.

    Args:
        schedule: an int (``early_budget`` of that rank), a stage, or a list of stages (see :mod:`dynrank.schedules`).
        keep_best_before: whether the best checkpoint may be one from before the last cut, with other ranks; then a
            cut after the last step is in no checkpoint.
        measure: validate directly before and after each change, on a share of the data that costs under 2% of the run,
            and put the ``check_monitor`` of the stage's How into the event.

    Attributes:
        driver: carries out the schedule in the run.

    Raises:
        ConfigurationError: if a value cannot be used.

    >>> from lightning import Trainer
    >>> trainer = Trainer(accelerator="cpu", logger=False, callbacks=[RankScheduler(4)])
    >>> trainer.callbacks[0].history
    []
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        keep_best_before: bool = False,
        measure: bool = False,
    ) -> None:
        self.driver = RankDriver(schedule, measure=measure)
        self.keep_best_before = keep_best_before
        # Whether step() was called since the last batch began, and whether it was ever called.
        self._stepped = self._ever_stepped = False
        # The step at which this fit() began.
        self._first_step = 0

    @property
    def history(self) -> list[RankEvent]:
        """Every change of the run, also those before a resume."""
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
        self.driver.end_step(LightningTraining(pl_module.trainer, pl_module))

    def state_dict(self) -> dict[str, Any]:
        return {**self.driver.state_dict(), "stepped": self._stepped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.driver.load_state_dict(state_dict)
        self._stepped = state_dict["stepped"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        follow_checkpoint_ranks(pl_module)
        follow_sharded_checkpoint(trainer)
        if stage == "fit":
            _check_callbacks(self, trainer)
            check_strategy(trainer)
            end_in_full(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step = trainer.global_step
        private.load_place_in_data(trainer)
        self.driver.start(LightningTraining(trainer, pl_module), _run(trainer, pl_module))
        if self.driver.progress.observed_step != trainer.global_step:
            run_missed_validation(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            check_validation(validation_metrics(trainer), self.driver.stages, measure=self.driver.measure)
        elif trainer.state.fn == "fit":
            self.driver.validated(LightningTraining(trainer, pl_module), validation_metrics(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_stepped(pl_module)
        if not trainer.enable_validation:
            self.driver.validated(LightningTraining(trainer, pl_module), {})

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if pl_module.automatic_optimization:
            between_steps = batch_idx % trainer.accumulate_grad_batches == 0
        else:
            between_steps = self._stepped
            self._stepped = False
        training = LightningTraining(trainer, pl_module)
        if between_steps:
            self.driver.advance(training)
        pl_module.log_dict(self.driver.hidden_rates(training))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.automatic_optimization:
            self.driver.end_step(LightningTraining(trainer, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_stepped(pl_module)
        before = len(self.history)
        self.driver.finish(LightningTraining(trainer, pl_module))
        if not self.keep_best_before and any(not event.undone for event in self.history[before:]):
            save_after_end(trainer, self)
        if self.history:
            warn_of_other_ranks(trainer, pl_module)

    def on_rank_change(self, trainer: Trainer, pl_module: LightningModule, event: RankEvent) -> None:
        if event.lowers and not self.keep_best_before:
            forget_best(trainer, pl_module, event)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.driver.abort()

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
                "the two out of callbacks"
            )
    others = [c for c in trainer.callbacks if isinstance(c, RankScheduler) and c is not scheduler]  # type: ignore[attr-defined]
    if others:
        raise ConfigurationError(
            f"one scheduler changes the ranks of a run, got {type(scheduler).__name__} and {type(others[0]).__name__} "
            "in callbacks; join their stages in one list, RankScheduler([*first, *second])"
        )


class LightningTraining(Training):
    """The present state of a run of Lightning's Trainer; made anew in each hook."""

    validate_by = "give fit() validation data"

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # An own optimizer_step may set rates, as Lightning's manual shows it.
        sets_rates = is_overridden("optimizer_step", pl_module)
        schedulers = None if sets_rates else [config.scheduler for config in trainer.lr_scheduler_configs]
        super().__init__(pl_module, trainer.optimizers, trainer.global_step, schedulers)
        # The trainer's model is wrapped by DDP.
        self.ddp = ddp_modules(trainer.strategy.model or pl_module)
        self.trainer = trainer
        self.pl_module = pl_module

    @property
    def validates(self) -> bool:
        return bool(self.trainer.enable_validation)

    def logged(self) -> Mapping[str, float]:
        return {name: float(value) for name, value in self.trainer.callback_metrics.items()}

    @property
    def validation_batches(self) -> int | None:
        batches = sum(self.trainer.num_val_batches)
        return int(batches) if 0 < batches < float("inf") else None

    def validate(self) -> Mapping[str, float]:
        """Validate for the metrics only."""
        return validate_beside(self.trainer)

    def validate_share(self, most: int) -> Mapping[str, float]:
        return validate_beside(self.trainer, most)

    def record(self, metrics: Mapping[str, float]) -> None:
        for logger in self.trainer.loggers:
            # Lightning, too, logs a validation with the number of the step before it.
            logger.log_metrics(dict(metrics), step=max(0, self.trainer.global_step - 1))

    def tell(self, event: RankEvent) -> None:
        """Call ``on_rank_change(trainer, pl_module, event)`` of every callback that defines it."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            hook = getattr(callback, "on_rank_change", None)
            if hook is not None:
                hook(self.trainer, self.pl_module, event)

    def warn(self, message: str) -> None:
        rank_zero_warn(message)


def _run(trainer: Trainer, pl_module: LightningModule) -> Run:
    """The length of the run; call it after the data are loaded."""
    # Under manual optimization only the module knows how many steps an epoch has. Lightning's own estimate takes the
    # number of batches in a step for constant.
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    varies = any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks)
    if varies or not pl_module.automatic_optimization:
        return Run(trainer.max_steps if trainer.max_steps > 0 else None)
    total = trainer.estimated_stepping_batches
    batches = trainer.num_training_batches
    per_epoch = None if batches == float("inf") else max(1, -(-int(batches) // trainer.accumulate_grad_batches))
    # Lightning returns -1 if an epoch has unknown length.
    return Run(int(total) if 0 <= total < float("inf") else None, per_epoch)
