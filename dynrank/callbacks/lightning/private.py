"""What dynrank asks of Lightning by its private names in more than one place."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


def val_dataloaders(trainer: Trainer) -> Any:
    """The data loaders of a validation, which are made if no validation came yet."""
    trainer.fit_loop.epoch_loop.val_loop.setup_data()
    return trainer.val_dataloaders


def is_sequential(trainer: Trainer) -> bool:
    """Whether a validation takes its data loaders one after the other, not a batch of each at a time."""
    val_dataloaders(trainer)
    return trainer.fit_loop.epoch_loop.val_loop._is_sequential


def save_as(callback: ModelCheckpoint, trainer: Trainer, path: str) -> None:
    """Let a ModelCheckpoint save into the file ``path`` now."""
    callback._save_checkpoint(trainer, path)
