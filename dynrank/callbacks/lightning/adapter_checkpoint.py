"""Checkpoints without the frozen base model: megabytes instead of gigabytes."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed.tensor import DTensor

from dynrank.callbacks.lightning.private import save_as
from dynrank.callbacks.lightning.strategies import check_averages
from dynrank.distributed.processes import from_all
from dynrank.errors import ConfigurationError, DivergedError
from dynrank.layers.frozen_base import follow_base, without_base
from dynrank.output.checkpoint_file import read_checkpoint, write_checkpoint


class AdapterCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, with all of its arguments, whose files leave out the base: the frozen parameters.

    A file contains every parameter that is trained (adapters, heads) or was trained (it has optimizer state), frozen
    adapters, all buffers, all that is outside the adapted model, and the usual state of optimizers, loops, callbacks
    and data. For each parameter of the base it contains a hash, which is computed once per run, so the base must not
    change during training. The base must be in the model when the file is loaded; a different base is refused before
    anything changes. ``Trainer.fit``, ``validate``, ``test(ckpt_path=...)`` and ``load_from_checkpoint`` load these
    files like others, and accept no other missing parameter. (For ``load_from_checkpoint`` of a model that PEFT has
    wrapped, see :func:`dynrank.layers.peft_layers.follow_checkpoint_ranks`.)

    If a run is killed at any moment, or the disk is full, the previous local checkpoint stays intact. A damaged file is
    not loaded. All checkpoints of the trainer leave out the base, also those of ``trainer.save_checkpoint``. Only files
    with ``weights_only`` contain the base, because Lightning calls no callback for them. A model with NaN or inf in its
    trained parameters is not saved.

    After SIGTERM (a job is preempted) the step ends, ``last.ckpt`` is saved in the callback's folder, and Lightning's
    SIGTERMException ends the program with exit code 0. In a validation this happens after the next step.

    Under FSDP2 it needs ``save_distributed_checkpoint=False``: each process has the whole adapter anyway.

    Attributes:
        stop_signals: the signals that end training in this way.
        stopped_by: the signal that this process has received; None: none.

    >>> from dynrank.callbacks import RankScheduler
    >>> callbacks = [RankScheduler(8), AdapterCheckpoint("checkpoints", monitor="val/loss", save_last=True)]
    >>> callbacks[1].monitor
    'val/loss'
    """

    stop_signals: tuple[int, ...] = (signal.SIGTERM,)
    stopped_by: int | None = None
    _seen_step = 0

    @property
    def last_saved(self) -> str:
        """Path of the last written checkpoint; "" if there is none."""
        return str(self._last_checkpoint_saved)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make checkpoints safe against interruption, and loadable without a base."""
        strategy: Any = trainer.strategy
        if isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint:
            raise ConfigurationError(
                "AdapterCheckpoint cannot leave the base out of a folder of shards; write one file by "
                "ModelParallelStrategy(save_distributed_checkpoint=False), or use ModelCheckpoint",
                "save_distributed_checkpoint",
            )
        # A checkpoint_io that the user has chosen stays.
        if type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = SafeCheckpointIO()
        check_averages(trainer)
        follow_base(pl_module)
        self._fingerprints: dict[str, str] = {}
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch for signals from now until the trainer's teardown, which restores the handlers from before training.

        Lightning's own handler of SIGTERM would end the run at the next batch, even in the middle of an accumulated
        step; and with several processes the one that got the signal would wait for the others forever.
        """
        self._seen_step = trainer.global_step
        self.stopped_by = None
        if threading.current_thread() is threading.main_thread():
            for number in self.stop_signals:
                signal.signal(number, self._record_signal)
        super().on_train_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        complete = trainer.global_step > self._seen_step
        self._seen_step = trainer.global_step
        if complete and self._any_stopped(trainer):
            # Lightning would log the step that ends now after the callbacks' hooks.
            trainer._logger_connector.on_batch_end()
            trainer._logger_connector.update_train_step_metrics()
            self._save_and_end(trainer)

    def _record_signal(self, number: int, frame: object) -> None:
        self.stopped_by = number
        if number == signal.SIGINT:
            # A second Ctrl-C ends the run at once.
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _any_stopped(self, trainer: Trainer) -> bool:
        """Whether any process has received a signal; a collective call."""
        stopped = self.stopped_by is not None
        if trainer.world_size == 1:
            return stopped
        return trainer.strategy.reduce_boolean_decision(stopped, all=False)

    def _save_and_end(self, trainer: Trainer) -> None:
        save_as(self, trainer, f"{self.dirpath}/{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")
        raise SIGTERMException

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the base out of ``checkpoint``."""
        _check_finite(pl_module)
        trained = [
            parameter for optimizer in trainer.optimizers for parameter, state in optimizer.state.items() if state
        ]
        checkpoint["state_dict"] = without_base(pl_module, checkpoint["state_dict"], trained, self._fingerprints)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise DivergedError if the run has diverged since its last checkpoint, and end after a late signal."""
        _check_finite(pl_module)
        super().on_train_end(trainer, pl_module)
        # No step follows the last validation.
        if self._any_stopped(trainer):
            self._save_and_end(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Add the step and the last good checkpoint to the error of a diverged run."""
        if isinstance(exception, DivergedError):
            good = self.last_saved or trainer.ckpt_path or "none"
            exception.add_note(f"found after step {trainer.global_step}; the last good checkpoint is {good}")
        super().on_exception(trainer, pl_module, exception)


def _check_finite(module: LightningModule) -> None:
    trained = {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}
    local = [value.to_local() if isinstance(value, DTensor) else value for value in trained.values()]
    # Stacked into one tensor, the results are copied from the device once.
    finite = torch.stack([value.isfinite().all().to(local[0].device) for value in local]).tolist() if local else []
    broken = [name for name, good in zip(trained, finite, strict=True) if not good]
    # The parameter with NaN may be in one process only.
    found = [name for names in from_all(broken) for name in names]
    if found:
        raise DivergedError(f"{found[0]!r} holds NaN or inf: the run has diverged; lower lr", "lr")


class SafeCheckpointIO(TorchCheckpointIO):
    """Reads and writes local files by :mod:`dynrank.output.checkpoint_file`, remote files as Lightning does.

    AdapterCheckpoint replaces Lightning's default by it; ``Trainer(plugins=[AsyncCheckpointIO(
    SafeCheckpointIO())])`` uses it in the background.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if _is_remote(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_checkpoint(checkpoint, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if _is_remote(path):
            return super().load_checkpoint(path, map_location, weights_only)
        return read_checkpoint(path, weights_only=weights_only is not False)


def _is_remote(path: str | Path) -> bool:
    return "://" in str(path)
