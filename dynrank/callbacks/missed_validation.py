"""The validation that Lightning skips when it resumes from a checkpoint written just before it.

A checkpoint made every n batches is written when the batch ends, before the validation that is due after that batch; on
resume Lightning 2.6 counts this validation as done. Whatever watches its metric would miss a value.
"""

from __future__ import annotations

from lightning.pytorch import Trainer


def run_missed_validation(trainer: Trainer) -> None:
    """Run that validation now, with all its hooks, if there is one; call it from ``on_train_start``."""
    epoch_loop = trainer.fit_loop.epoch_loop
    if not epoch_loop.restarted_on_train_batch_end or not _is_due(trainer):
        return
    trainer.validating = True
    epoch_loop.val_loop.restarting = False
    epoch_loop.val_loop.run()
    trainer.training = True


def _is_due(trainer: Trainer) -> bool:
    every_n_epochs, every_n_batches = trainer.check_val_every_n_epoch, trainer.val_check_batch
    if not trainer.enable_validation or (every_n_epochs is not None and (trainer.current_epoch + 1) % every_n_epochs):
        return False
    if every_n_batches is None or every_n_batches == float("inf"):
        return trainer.is_last_batch
    done = (trainer.fit_loop.total_batch_idx if every_n_epochs is None else trainer.fit_loop.batch_idx) + 1
    return done % every_n_batches == 0
