"""The private names of Lightning that dynrank needs, each in a function that says its purpose."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy


def val_dataloaders(trainer: Trainer) -> Any:
    """The data loaders of a validation, which are made if no validation came yet."""
    trainer.fit_loop.epoch_loop.val_loop.setup_data()
    return trainer.val_dataloaders


def is_sequential(trainer: Trainer) -> bool:
    """Whether a validation takes its data loaders one after the other, not a batch of each at a time."""
    val_dataloaders(trainer)
    return trainer.fit_loop.epoch_loop.val_loop._is_sequential


def before_transfer(module: LightningModule, batch: Any, loader: int) -> Any:
    """The batch after ``on_before_batch_transfer`` of the module or of its datamodule."""
    return module._on_before_batch_transfer(batch, dataloader_idx=loader)


def log_step(trainer: Trainer) -> None:
    """Log the step that ends now; Lightning would log it after the callbacks' hooks."""
    trainer._logger_connector.on_batch_end()
    trainer._logger_connector.update_train_step_metrics()


def last_saved(callback: ModelCheckpoint) -> str:
    """Path of the last checkpoint that a checkpoint callback has written; "" if there is none."""
    return str(callback._last_checkpoint_saved)


def save_as(callback: ModelCheckpoint, trainer: Trainer, path: str) -> None:
    """Let a ModelCheckpoint save into the file ``path`` now."""
    callback._save_checkpoint(trainer, path)


def load_place_in_data(trainer: Trainer) -> None:
    """Restore the data loaders' positions; Lightning does not if the length of the run was asked for before."""
    trainer.fit_loop._load_combined_loader_states()


def start_method(strategy: DDPStrategy) -> str:
    """How DDP starts its processes."""
    return strategy._start_method


def tensor_parallel_size(strategy: ModelParallelStrategy) -> Any:
    """The number of parts into which each layer is split, or "auto"."""
    return strategy._tensor_parallel_size


def saves_in_parts(strategy: Strategy) -> bool:
    """Whether a checkpoint is a folder to which all processes write."""
    return isinstance(strategy, ModelParallelStrategy) and bool(strategy._save_distributed_checkpoint)
