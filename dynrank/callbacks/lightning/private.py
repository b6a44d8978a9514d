"""The private names of Lightning that dynrank needs, each in a function that says its purpose."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor


def results(trainer: Trainer) -> Any:
    """The logged results of the running loop, with each metric's sum and weight."""
    return trainer._results


def step_values(trainer: Trainer) -> dict[str, Any]:
    """{metric of training that has the value of a step: its last value}; another object each time that it is logged."""
    return {
        name: result._forward_cache
        for result in trainer.fit_loop.epoch_loop._results.values()
        for name in (result.meta.name, result.meta.forked_name(on_step=True))
        # An epoch resets what its steps have not logged yet.
        if result.meta.on_step and not result.has_reset and isinstance(result._forward_cache, Tensor)
    }


def epoch_means(trainer: Trainer) -> set[str]:
    """The metrics of training that Lightning computes at the end of an epoch alone."""
    return {meta.forked_name(on_step=False) for meta in _logged_in_training(trainer) if meta.on_epoch}


def own_names(trainer: Trainer, *, on_step: bool) -> dict[str, str]:
    """{metric of training that has the value of a step, and at the end of an epoch the mean over it: its other name}.

    The other name stands for one of the two alone: for the value of a step, or for the mean.
    """
    return {meta.name: meta.forked_name(on_step) for meta in _logged_in_training(trainer) if meta.forked}


def also_means(names: Collection[str]) -> list[str]:
    """Those of the metrics ``names`` of steps that have the mean over an epoch at its end, told by their names."""
    return [name for name in names if f"{name}_step" in names]


def _logged_in_training(trainer: Trainer) -> list[Any]:
    return [result.meta for result in trainer.fit_loop.epoch_loop._results.values()]


def reads_at_end_of_epoch(callback: Callback, trainer: Trainer) -> bool:
    """Whether a ModelCheckpoint or an EarlyStopping acts when an epoch has ended, not after steps or validations."""
    if isinstance(callback, ModelCheckpoint):
        return callback._every_n_epochs > 0 and callback._should_save_on_train_epoch_end(trainer)
    return isinstance(callback, EarlyStopping) and bool(callback._check_on_train_epoch_end)


@contextmanager
def metrics_kept(trainer: Trainer) -> Iterator[None]:
    """Restore the trainer's metrics after the block."""
    connector = trainer._logger_connector
    names = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
    before = {name: dict(getattr(connector, name)) for name in names}
    try:
        yield
    finally:
        vars(connector).update(before)


@contextmanager
def first_batch_kept(trainer: Trainer) -> Iterator[None]:
    """Allow a validation inside the block, and restore the first-batch mark, which a validation deletes."""
    connector = trainer._logger_connector
    first_batch = connector._first_loop_iter
    yield
    connector._first_loop_iter = first_batch


def is_sequential(trainer: Trainer) -> bool:
    """Whether a validation takes its data loaders one after the other, not a batch of each at a time."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    return loop._combined_loader is not None and loop._is_sequential


def validation_loaders(trainer: Trainer) -> CombinedLoader | None:
    """The data loaders of a validation now, which are made if there are none, or are due to be made anew."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.setup_data()
    return loop._combined_loader


@contextmanager
def fewer_batches(trainer: Trainer, most: int | None) -> Iterator[None]:
    """Let validations in the block take about ``most`` batches of sequential loaders, at equal distances; None: all."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    # Loaders that were made inside the block would not come back after it.
    loaders = validation_loaders(trainer)
    if most is not None and loaders is not None:
        every = -(-int(sum(loop._max_batches)) // most)
        loop._combined_loader = _Share(loaders, [int(count) for count in loop._max_batches], every)
    try:
        yield
    finally:
        loop._combined_loader = loaders


class _Share(CombinedLoader):
    """Every n-th batch of each of some sequential loaders, from the middle of the first n on, with its own number."""

    def __init__(self, loaders: CombinedLoader, counts: Sequence[int], every: int) -> None:
        super().__init__(loaders.iterables, "sequential")
        self._chosen = [range(max(0, min(every // 2, count - 1)), count, every) for count in counts]

    def __len__(self) -> int:
        return sum(map(len, self._chosen))

    def __next__(self) -> Any:
        while True:
            batch, number, loader = super().__next__()
            if number in self._chosen[loader]:
                return batch, number, loader


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


def save_now(callback: ModelCheckpoint, trainer: Trainer) -> None:
    """Let a ModelCheckpoint save with the trainer's present metrics, if they are among its best, and its ``last``."""
    metrics = callback._monitor_candidates(trainer)
    callback._save_topk_checkpoint(trainer, metrics)
    callback._save_last_checkpoint(trainer, metrics)


def load_place_in_data(trainer: Trainer) -> None:
    """Restore the data loaders' positions; Lightning does not if the length of the run was asked for before."""
    trainer.fit_loop._load_combined_loader_states()


def number_steps_for_loggers(trainer: Trainer) -> None:
    """Set the step number of the loggers to the number of optimizer steps made."""
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped = loop.global_step


def average_model(callback: Callback) -> Any:
    """The average of the weights that a callback keeps; None if it keeps none."""
    return getattr(callback, "_average_model", None)


def start_method(strategy: DDPStrategy) -> str:
    """How DDP starts its processes."""
    return strategy._start_method


def tensor_parallel_size(strategy: ModelParallelStrategy) -> Any:
    """The number of parts into which each layer is split, or "auto"."""
    return strategy._tensor_parallel_size


def saves_in_parts(strategy: Strategy) -> bool:
    """Whether a checkpoint is a folder to which all processes write."""
    return isinstance(strategy, ModelParallelStrategy) and bool(strategy._save_distributed_checkpoint)
