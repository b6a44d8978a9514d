"""Lightning's loops inside ``fit`` when Lightning would not run them: a validation at any moment, a resumed run's end.

Lightning itself skips one validation: a ModelCheckpoint of every n steps is written when the batch ends, before the
validation that is due after that batch; on resume Lightning 2.6 counts this validation as done. A trigger would miss a
value of its metric.
"""

import copy
from math import inf

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from dynrank.callbacks.lightning import private


class _Metrics(Callback):
    """Keeps the metrics of a validation."""

    def __init__(self) -> None:
        # Without any batch, Lightning calls no hook of a validation.
        self.logged: dict[str, float] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.logged = validation_metrics(trainer)


def validate_beside(trainer: Trainer, most: int | None = None) -> dict[str, float]:
    """Validate now, in addition to the run's own validations, and return the metrics.

    Call this between two batches of ``fit``. No callback hears of it, loggers get nothing, and the trainer's metrics do
    not change. About ``most`` batches are taken, at equal distances; None: all.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    metrics = _Metrics()
    bars = [_deaf(callback) for callback in callbacks if isinstance(callback, ProgressBar)]
    trainer.callbacks = [*bars, metrics]  # type: ignore[attr-defined]
    try:
        with private.nothing_logged(trainer), private.fewer_batches(trainer, most):
            run_validation(trainer)
    finally:
        trainer.callbacks = callbacks  # type: ignore[attr-defined]
    return metrics.logged


def _deaf(bar: ProgressBar) -> ProgressBar:
    """A copy that hears of nothing: the thread that draws a RichProgressBar asks the trainer for a bar of its class."""
    hooks = {name: lambda *_, **__: None for name in vars(Callback) if name.startswith("on_")}
    copied = copy.copy(bar)
    copied.__class__ = type(type(bar).__name__, (type(bar),), hooks)
    return copied


def validation_metrics(trainer: Trainer) -> dict[str, float]:
    """The metrics of the validation that ends now, without training's; call this from ``on_validation_end``."""
    results = private.results(trainer)
    loader = results.dataloader_idx
    found = dict[str, float]()
    try:
        for index in dict.fromkeys([loader, *(result.meta.dataloader_idx for result in results.values())]):
            # Lightning returns only metrics of the selected data loader, and those that were logged without an index.
            results.dataloader_idx = index
            found |= {name: float(value) for name, value in private.metrics_of_callbacks(trainer).items()}
    finally:
        results.dataloader_idx = loader
    return found


def run_validation(trainer: Trainer) -> None:
    """Validate now, with all hooks and logged metrics, and set the trainer back to training."""
    val_loop = trainer.fit_loop.epoch_loop.val_loop
    with private.first_batch_kept(trainer):
        trainer.validating = True
        val_loop.restarting = False
        val_loop.run()
        trainer.training = True


def run_missed_validation(trainer: Trainer) -> None:
    """Run the validation that Lightning skips on resume, if one is due; call this from ``on_train_start``."""
    if trainer.fit_loop.epoch_loop.restarted_on_train_batch_end and is_due(trainer):
        run_validation(trainer)


def is_due(trainer: Trainer) -> bool:
    """Whether a validation is due after the present training batch."""
    every_n_epochs = trainer.check_val_every_n_epoch
    every_n_batches = trainer.val_check_batch
    if not trainer.enable_validation or (every_n_epochs is not None and (trainer.current_epoch + 1) % every_n_epochs):
        return False
    if every_n_batches is None or every_n_batches == inf:
        return trainer.is_last_batch
    done = (trainer.fit_loop.total_batch_idx if every_n_epochs is None else trainer.fit_loop.batch_idx) + 1
    return done % every_n_batches == 0


def end_in_full(trainer: Trainer) -> None:
    """Call on_train_start and on_train_end also when a run is resumed after its last step; Lightning skips them.

    Without them the work after the last step (a change of rank, putting an average into the model) would never be done
    in a run that was killed between its last checkpoint and its end. If the checkpoint ends an epoch that was shorter
    than now, as with more processes, Lightning would count empty epochs with a step each. Call this in ``setup``.
    """
    loop = trainer.fit_loop
    if "run" in vars(loop):
        return
    run = loop.run

    def run_in_full() -> None:
        # If there is nothing left to train, run() would not set up the data.
        loop.setup_data()
        batches = loop.epoch_loop.batch_progress
        if batches.current.ready < loop.max_batches < inf:
            batches.is_last_batch = False
        if loop.restarting and loop.max_batches and loop.done:
            loop.reset()
            loop.on_run_start()
            if trainer.lightning_module.automatic_optimization:
                private.number_steps_for_loggers(trainer)
            loop.restarting = False
            loop.on_run_end()
        else:
            run()

    loop.run = run_in_full  # type: ignore[method-assign]
