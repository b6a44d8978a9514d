"""The private names of Lightning that dynrank needs, each with what it is for, because no public name does it.

``tests/callbacks/lightning/test_private.py`` fails when a release of Lightning takes one away.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy


def results(trainer: Trainer) -> Any:
    """What the loop under way has logged, with each metric's sum and weight."""
    return trainer._results


def metrics_of_callbacks(trainer: Trainer) -> dict[str, Any]:
    """What a callback would see of the results that are current."""
    return dict(trainer._logger_connector.metrics["callback"])


@contextmanager
def nothing_logged(trainer: Trainer) -> Iterator[None]:
    """Within the block loggers hear nothing, and afterwards the trainer's metrics are those of before."""
    connector = trainer._logger_connector
    shown = {name: dict(getattr(connector, name)) for name in ("_callback_metrics", "_progress_bar_metrics")}
    try:
        connector.log_metrics = lambda *_, **__: None  # type: ignore[method-assign]
        yield
    finally:
        vars(connector).pop("log_metrics", None)
        vars(connector).update(shown)


@contextmanager
def first_batch_kept(trainer: Trainer) -> Iterator[None]:
    """Within the block a validation may run: it forgets a mark that the training loop needs, too."""
    connector = trainer._logger_connector
    first_batch = connector._first_loop_iter
    yield
    connector._first_loop_iter = first_batch


def log_step(trainer: Trainer) -> None:
    """Log the step that is ending now; Lightning does so after the hooks of its callbacks."""
    trainer._logger_connector.on_batch_end()
    trainer._logger_connector.update_train_step_metrics()


def loops_state(trainer: Trainer) -> dict[str, Any]:
    """Where the loops are, as a checkpoint holds it."""
    return trainer._checkpoint_connector._get_loops_state_dict()


def last_saved(callback: Any) -> str:
    """The checkpoint that a checkpoint callback has written last; empty if none."""
    return str(callback._last_checkpoint_saved)


def load_place_in_data(trainer: Trainer) -> None:
    """Put data loaders where the checkpoint says; Lightning forgets that if it was asked for the length of the run."""
    trainer.fit_loop._load_combined_loader_states()


def number_steps_for_loggers(trainer: Trainer) -> None:
    """Let loggers number what comes now by the optimizer steps made."""
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped = loop.global_step


def average_model(callback: Callback) -> Any:
    """The average that a callback keeps of the weights; None if it keeps none."""
    return getattr(callback, "_average_model", None)


def start_method(strategy: DDPStrategy) -> str:
    """How DDP starts its processes."""
    return strategy._start_method


def communication_state(strategy: DDPStrategy) -> Any:
    """The state of DDP's communication hook; None without one."""
    return strategy._ddp_comm_state


def tensor_parallel_size(strategy: ModelParallelStrategy) -> Any:
    """Into how many parts each layer is split."""
    return strategy._tensor_parallel_size


def saves_in_parts(strategy: Strategy) -> bool:
    """Whether checkpoints are folders that all processes write."""
    return isinstance(strategy, ModelParallelStrategy) and bool(strategy._save_distributed_checkpoint)
