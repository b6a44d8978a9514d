"""What Lightning leaves out when it resumes a run: a validation that was due."""

from math import inf

from lightning.pytorch import Trainer


def has_missed_validation(trainer: Trainer) -> bool:
    """Whether a resumed run, in ``on_train_start``, has a validation behind it that was due and never made.

    A ModelCheckpoint of every n steps is written when the batch ends, before the validation that is due after that
    batch; on resume Lightning 2.6 counts this validation as done. A trigger would miss a value of its metric.
    """
    if not trainer.fit_loop.epoch_loop.restarted_on_train_batch_end or not trainer.enable_validation:
        return False
    every_n_epochs = trainer.check_val_every_n_epoch
    every_n_batches = trainer.val_check_batch
    # Behind the last batch of an epoch, a resumed run is in the next one.
    epochs = trainer.current_epoch + (not trainer.is_last_batch)
    if every_n_epochs is not None and epochs % every_n_epochs:
        return False
    if every_n_batches is None or every_n_batches == inf:
        return trainer.is_last_batch
    done = (trainer.fit_loop.total_batch_idx if every_n_epochs is None else trainer.fit_loop.batch_idx) + 1
    return done % every_n_batches == 0
