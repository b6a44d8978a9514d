"""The callback that changes ranks in the middle of a run, as a schedule says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.utilities import rank_zero_warn

from dynrank.callbacks.generations import Generations
from dynrank.callbacks.lightning import private
from dynrank.callbacks.lightning.averages import act_after_averages, averages_of
from dynrank.callbacks.lightning.ending import end_in_full
from dynrank.callbacks.lightning.strategies import (
    average_whole_gradients,
    check_strategy,
    follow_sharded_checkpoint,
)
from dynrank.callbacks.lightning.validation import run_missed_validation, validate_beside, validation_metrics
from dynrank.driver.driver import RankDriver, Schedule
from dynrank.driver.event import RankEvent
from dynrank.driver.metrics import check_validation
from dynrank.driver.training import Batches, Training
from dynrank.errors import ConfigurationError
from dynrank.layers.peft_layers import follow_checkpoint_ranks
from dynrank.triggers import Run


class RankScheduler(Callback):
    """Changes the ranks of LoRA layers during training.

    Works in any LightningModule whose model went through :func:`dynrank.add_lora` or PEFT's ``get_peft_model``; under
    manual optimization, which may have several optimizers, that calls :meth:`step`. Metrics are observed after each
    validation (after each epoch, if nothing is validated). A change is made at the start of a later batch, between an
    optimizer step and the next forward, never with gradients pending. A stage whose time or deadline has come ends
    those before it. A checkpoint holds everything that is needed to go on from it, whether the change is still to come,
    being measured, decided, or made. Lightning's averages of the weights follow, in any order of the callbacks.

    A layer with a final rank of its own (rank map) is never shrunk below it and ends there in the last stage; a pinned
    layer is never touched. One scheduler drives one run: a trainer takes one (lists of stages add up), and the next run
    a new one.

    Callbacks of the trainer that define ``on_rank_change(trainer, pl_module, event)`` are told of each change after it
    was made or undone.

    Args:
        schedule: an int (``early_budget`` of that rank), a stage, or a list of stages (see :mod:`dynrank.schedules`).
        check_every: optimizer steps between checks that all processes hold the same adapters and optimizer state, which
            are made at the start and around each change in any case; None: no more than those.

    Attributes:
        driver: holds the schedule, and takes it through the run.

    Raises:
        ConfigurationError: if a value cannot be used.
    """

    def __init__(self, schedule: Schedule, *, check_every: int | None = None) -> None:
        self.driver = RankDriver(schedule, check_every=check_every)
        # Whether step() was called: since the last batch began, and at all.
        self._told = self._ever_told = False

    @property
    def history(self) -> list[RankEvent]:
        """Every change of the run, also those before a resume."""
        return self.driver.history

    def step(self, pl_module: LightningModule) -> None:
        """Say, under manual optimization, that an optimizer step was made and that no gradients wait for another.

        Call it in ``training_step`` after each optimizer step of the adapter, before its gradients are zeroed. A change
        that is due is made when the next batch starts. Times are those of ``trainer.global_step``, which counts the
        steps of every optimizer.

        Raises:
            RuntimeError: under automatic optimization, where Lightning says so.
        """
        if pl_module.automatic_optimization:
            raise RuntimeError("scheduler.step(module) is for manual optimization; this module's is automatic")
        self._told = self._ever_told = True
        self.driver.end_step(LightningTraining(pl_module.trainer, pl_module))

    def state_dict(self) -> dict[str, Any]:
        return {**self.driver.state_dict(), "told": self._told}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.driver.load_state_dict(state_dict)
        self._told = state_dict["told"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Averages that are made later are copies of a module that follows checkpoints.
        for module in [pl_module, *averages_of(trainer)]:
            follow_checkpoint_ranks(module)
        follow_sharded_checkpoint(trainer)
        if stage == "fit":
            check_strategy(trainer)
            end_in_full(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        private.load_place_in_data(trainer)
        self.driver.start(LightningTraining(trainer, pl_module), _run(trainer, pl_module))
        act_after_averages(trainer, self)
        if self.driver.progress.observed_step != trainer.global_step:
            run_missed_validation(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            check_validation(validation_metrics(trainer), self.driver.stages)
        elif trainer.state.fn == "fit":
            self.driver.validated(LightningTraining(trainer, pl_module), validation_metrics(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_told(pl_module)
        if not trainer.enable_validation:
            self.driver.validated(LightningTraining(trainer, pl_module), {})

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if pl_module.automatic_optimization:
            between_steps = batch_idx % trainer.accumulate_grad_batches == 0
        else:
            between_steps, self._told = self._told, False
        if between_steps:
            self.driver.advance(LightningTraining(trainer, pl_module))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        average_whole_gradients(trainer, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.automatic_optimization:
            self.driver.end_step(LightningTraining(trainer, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_told(pl_module)
        self.driver.finish(LightningTraining(trainer, pl_module))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.driver.abort()

    def _check_told(self, pl_module: LightningModule) -> None:
        """Refuse manual optimization that makes optimizer steps and never says so."""
        steps = pl_module.trainer.global_step
        if self.driver.stages and steps and not pl_module.automatic_optimization and not self._ever_told:
            raise ConfigurationError(
                f"{steps} optimizer steps of manual optimization, and RankScheduler was told of none, so it could not "
                "change a rank: call scheduler.step(self) in training_step, after the optimizer's step"
            )


# These hear nothing of validations that a change asks for.
_DEAF = Checkpoint, EarlyStopping, Generations, RankScheduler


class LightningTraining(Training):
    """A run of Lightning's Trainer, as it is now; made for one hook."""

    validate_by = "give fit() validation data"

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().__init__(pl_module, trainer.optimizers, trainer.global_step, averages_of(trainer))
        self.trainer, self.pl_module = trainer, pl_module

    @property
    def validates(self) -> bool:
        return bool(self.trainer.enable_validation)

    def loss_scale(self) -> float:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return 1.0 if scaler is None else float(scaler.get_scale())

    def logged(self) -> Mapping[str, float]:
        return {name: float(value) for name, value in self.trainer.callback_metrics.items()}

    def validate_batches(self, monitor: str) -> tuple[Mapping[str, float], Batches]:
        """Validate for the sake of the metrics; callbacks that save, stop or change ranks hear nothing of it."""
        return validate_beside(self.trainer, *_DEAF, monitor=monitor)

    def record(self, metrics: Mapping[str, float]) -> None:
        for logger in self.trainer.loggers:
            logger.log_metrics(dict(metrics), step=self.trainer.global_step)

    def tell(self, event: RankEvent) -> None:
        """Call ``on_rank_change(trainer, pl_module, event)`` of every callback that defines it."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            told = getattr(callback, "on_rank_change", None)
            if told is not None:
                told(self.trainer, self.pl_module, event)

    def warn(self, message: str) -> None:
        rank_zero_warn(message)


def _run(trainer: Trainer, pl_module: LightningModule) -> Run:
    """The length of the run; the data have been loaded."""
    # Under manual optimization only the module knows how many steps an epoch has.
    if not pl_module.automatic_optimization:
        return Run(trainer.max_steps if trainer.max_steps > 0 else None)
    total, batches = trainer.estimated_stepping_batches, trainer.num_training_batches
    per_epoch = None if batches == float("inf") else max(1, -(-int(batches) // trainer.accumulate_grad_batches))
    # Lightning says -1 for epochs of data of unknown length.
    return Run(int(total) if 0 <= total < float("inf") else None, per_epoch)
