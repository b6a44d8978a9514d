"""Checkpoints without the frozen base: megabytes where the whole model has gigabytes."""

from __future__ import annotations

from math import isfinite
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed.tensor import DTensor

from dynrank.callbacks.lightning import private
from dynrank.callbacks.lightning.sigterm import SigtermNotice
from dynrank.callbacks.lightning.validation import is_due
from dynrank.distributed.processes import from_all
from dynrank.errors import ConfigurationError, DivergedError
from dynrank.layers.frozen_base import adapted_models, follow_base, without_base
from dynrank.output.checkpoint_file import read_checkpoint, write_checkpoint

# Lightning's WeightAveraging adds the second.
_STATES = ("state_dict", "current_model_state")


class AdapterCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, all of its arguments included, whose files leave the frozen base out.

    They hold every parameter that is trained (adapters, heads) or has been (it has optimizer state), frozen adapters,
    all buffers, what lies outside the adapted model, and the state of optimizers, loops, callbacks and data as ever. Of
    the base they hold a hash per parameter: it has to be there when they are loaded, and another one is refused before
    anything has changed. (A frozen parameter that your own code writes to while training makes the base another one.)
    ``Trainer.fit``, ``validate``, ``test(ckpt_path=...)`` and ``load_from_checkpoint`` take these files as they take
    others, and accept no other parameter missing. (For ``load_from_checkpoint`` of a model that PEFT has wrapped, see
    :func:`dynrank.layers.peft_layers.follow_checkpoint_ranks`.)

    Local files are written so that a run killed at any moment, or a full disk, leaves the previous checkpoint whole,
    and a damaged file is not loaded. All checkpoints of a trainer with it are of this kind, those of
    ``trainer.save_checkpoint`` too; but Lightning asks no callback about files with ``weights_only``, which hold the
    base. A model with NaN or inf in its trained parameters is not saved.

    SIGTERM in training, as before a job is preempted, lets the step end, saves ``last.ckpt`` in the callback's folder
    and raises Lightning's SIGTERMException, which ends the program with exit code 0. In a validation it does so after
    the batch, and the run goes on with the whole validation. What is ended first is a validation that a change of rank
    asks for, and one in which processes have unlike numbers of batches, or do not know them.

    Under FSDP2 it needs ``save_distributed_checkpoint=False``: the adapter is whole in each process anyway.
    """

    _sigterm: SigtermNotice | None = None
    _seen_step = 0
    # The state of the loops when the batch before a validation was over, and the one that is to be saved.
    _before_validation: dict[str, Any] | None = None
    _loops: dict[str, Any] | None = None

    @property
    def last_saved(self) -> str:
        """The checkpoint that was written last; empty if none."""
        return private.last_saved(self)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let checkpoints be written and read safely, and loaded without a base."""
        for other in trainer.checkpoint_callbacks:
            if isinstance(other, ModelCheckpoint) and not isinstance(other, AdapterCheckpoint):
                raise ConfigurationError(
                    f"beside AdapterCheckpoint, {type(other).__name__} would write checkpoints without the base, too; "
                    "take one of the two out, or make both AdapterCheckpoint"
                )
        strategy: Any = trainer.strategy
        if private.saves_in_parts(strategy):
            raise ConfigurationError(
                "AdapterCheckpoint cannot leave the base out of a folder of shards; set "
                "save_distributed_checkpoint=False (trainer.strategy.save_distributed_checkpoint=false), which writes "
                "one file without the base, or use ModelCheckpoint"
            )
        # A checkpoint_io that the user has chosen stays.
        if type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = SafeCheckpointIO()
        for model in [pl_module, *map(private.average_model, trainer.callbacks)]:  # type: ignore[attr-defined]
            if model is not None:
                follow_base(model)
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch for SIGTERM from now on."""
        if not adapted_models(pl_module):
            raise ConfigurationError(
                "AdapterCheckpoint needs a model with LoRA layers (dynrank.add_lora or PEFT); use ModelCheckpoint"
            )
        self._seen_step, self._sigterm = trainer.global_step, SigtermNotice()
        self._before_validation = self._loops = None
        super().on_train_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        complete, self._seen_step = trainer.global_step > self._seen_step, trainer.global_step
        if complete and self._sigterm is not None and self._sigterm.received(trainer):
            private.log_step(trainer)
            self._save_and_end(trainer)
        self._before_validation = private.loops_state(trainer) if is_due(trainer) else None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._before_validation is not None:
            own, *others = from_all(trainer.num_val_batches)
            # Only those that end each batch together can agree on an end there.
            if others and not (all(counts == own for counts in others) and isfinite(sum(own))):
                self._before_validation = None

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self._before_validation is not None and self._sigterm is not None and self._sigterm.received(trainer):
            self._loops = self._before_validation
            self._save_and_end(trainer)

    def _save_and_end(self, trainer: Trainer) -> None:
        self._save_checkpoint(trainer, f"{self.dirpath}/{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")
        raise SIGTERMException

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the base out of ``checkpoint``."""
        _check_finite(pl_module)
        checkpoint["loops"] = self._loops or checkpoint["loops"]
        trained = [
            parameter for optimizer in trainer.optimizers for parameter, state in optimizer.state.items() if state
        ]
        for key in _STATES:
            if key in checkpoint:
                checkpoint[key] = without_base(pl_module, checkpoint[key], trained)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let no run end well that has diverged since its last checkpoint; errors as in :meth:`on_save_checkpoint`."""
        _check_finite(pl_module)
        super().on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Add to the error of a run that has diverged where it did, and what to go on from."""
        if isinstance(exception, DivergedError):
            good = self.last_saved or trainer.ckpt_path or "none"
            exception.add_note(
                f"found after step {trainer.global_step}; the last good checkpoint (ckpt_path) is {good}"
            )
        super().on_exception(trainer, pl_module, exception)


def _check_finite(module: LightningModule) -> None:
    # One process alone may hold the parameter that is broken.
    found = [name for name in from_all(_not_finite(module)) if name]
    if found:
        raise DivergedError(f"{found[0]!r} holds NaN or inf: the run has diverged; lower optimizer.lr")


def _not_finite(module: LightningModule) -> str | None:
    """The name of a trained parameter that holds NaN or inf in this process, if one does."""
    trained = {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}
    local = [value.to_local() if isinstance(value, DTensor) else value for value in trained.values()]
    if not local:
        return None
    # One stacked tensor is read from the device once.
    finite = torch.stack([value.isfinite().all().to(local[0].device) for value in local])
    return next((name for name, good in zip(trained, finite.tolist(), strict=True) if not good), None)


class SafeCheckpointIO(TorchCheckpointIO):
    """Local files go through :mod:`dynrank.output.checkpoint_file`, remote ones as Lightning does it.

    AdapterCheckpoint puts it in the place of Lightning's default; ``Trainer(plugins=[AsyncCheckpointIO(
    SafeCheckpointIO())])`` uses it in the background.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if _is_remote(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_checkpoint(checkpoint, path)

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if _is_remote(path):
            return super().load_checkpoint(path, map_location, weights_only)
        return read_checkpoint(path, weights_only=weights_only is not False)


def _is_remote(path: Any) -> bool:
    return "://" in str(path)
