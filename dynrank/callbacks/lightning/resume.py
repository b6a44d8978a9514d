"""What Lightning leaves out when it resumes a run: a validation, and the hooks of a run that has made its last step."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import inf

import torch
from lightning.pytorch import Trainer

from dynrank.callbacks.lightning import private
from dynrank.callbacks.lightning.validations import run_validation


def run_missed_validation(trainer: Trainer, logged: Mapping[str, float]) -> None:
    """Run the validation that Lightning skips on resume, if one is due; call this from ``on_train_start``.

    Callbacks may judge it by a metric of training; ``logged`` has the values of before the resume.

    A ModelCheckpoint of every n steps is written when the batch ends, before the validation that is due after that
    batch; on resume Lightning 2.6 counts this validation as done. A trigger would miss a value of its metric.
    """
    if trainer.fit_loop.epoch_loop.restarted_on_train_batch_end and is_due(trainer):
        with metrics_lent(trainer, logged):
            run_validation(trainer)


@contextmanager
def metrics_lent(trainer: Trainer, logged: Mapping[str, float]) -> Iterator[None]:
    """Let callbacks find the values ``logged`` inside the block, which Lightning has forgotten in a resume.

    Afterwards it knows no more than without them: it takes a metric that is there for one that is logged anew.
    """
    metrics = trainer.callback_metrics
    device = trainer.strategy.root_device
    lent = {name: torch.tensor(value, device=device) for name, value in logged.items() if name not in metrics}
    metrics.update(lent)
    try:
        yield
    finally:
        for name, value in lent.items():
            if metrics.get(name) is value:
                del metrics[name]


def is_due(trainer: Trainer) -> bool:
    """Whether a validation is due after the training batch behind which a run is resumed."""
    every_n_epochs = trainer.check_val_every_n_epoch
    every_n_batches = trainer.val_check_batch
    # Behind the last batch of an epoch, a resumed run is in the next one.
    epochs = trainer.current_epoch + (not trainer.is_last_batch)
    if not trainer.enable_validation or (every_n_epochs is not None and epochs % every_n_epochs):
        return False
    if every_n_batches is None or every_n_batches == inf:
        return trainer.is_last_batch
    done = (trainer.fit_loop.total_batch_idx if every_n_epochs is None else trainer.fit_loop.batch_idx) + 1
    return done % every_n_batches == 0


def call_hooks_of_ended_run(trainer: Trainer) -> None:
    """Call on_train_start and on_train_end also if a run is resumed after its last step; Lightning would skip them.

    Without them the work after the last step (a change of rank, putting an average into the model) would never be done
    in a run that was killed between its last checkpoint and its end. If the checkpoint ends an epoch that was shorter
    than now, as with more processes, Lightning would count empty epochs with a step each. Call this in ``setup``.
    """
    loop = trainer.fit_loop
    if "run" in vars(loop):
        return
    run = loop.run

    def run_with_hooks() -> None:
        # If there is nothing left to train, run() would not set up the data.
        loop.setup_data()
        batches = loop.epoch_loop.batch_progress
        if batches.current.ready < loop.max_batches < inf:
            batches.is_last_batch = False
        # Behind the end of an epoch, Lightning says only with max_steps that the loop is restarting.
        is_resumed = loop.restarting or trainer.ckpt_path is not None
        if is_resumed and loop.max_batches and loop.done:
            loop.reset()
            loop.on_run_start()
            if trainer.lightning_module.automatic_optimization:
                private.number_steps_for_loggers(trainer)
            loop.restarting = False
            loop.on_run_end()
        else:
            run()

    loop.run = run_with_hooks  # type: ignore[method-assign]
