"""Checkpoints of what is trained, without the frozen base: megabytes where the whole model has gigabytes."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from dynrank.callbacks.trainer.sigterm import SigtermNotice
from dynrank.callbacks.trainer.validation import is_due
from dynrank.errors import ConfigurationError
from dynrank.layers.frozen_base import follow_base, frozen_bases, left_out, sampled, without_base
from dynrank.output.checkpoint_file import read_checkpoint, write_checkpoint
from dynrank.output.whole_file import PART

_STATES = ("state_dict", "current_model_state")  # Lightning's WeightAveraging adds the second


class AdapterCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, all of its arguments included, whose files leave the frozen base out.

    They hold every parameter that requires a gradient (adapters, heads), adapters that are frozen for the moment, all
    buffers, what lies outside the adapted model, any frozen parameter whose values have changed since training began,
    and the state of optimizers, loops, callbacks and data as ever. Of the base they hold names, shapes, dtypes and 256
    values per parameter: it has to be there when they are loaded, and another one is refused before anything has
    changed. ``Trainer.fit``, ``validate``, ``test(ckpt_path=...)`` and ``load_from_checkpoint`` take them as they take
    others, and ``strict_loading`` still accepts no other parameter missing. (For ``load_from_checkpoint`` of a model
    that PEFT has wrapped, see :func:`dynrank.layers.peft_layers.follow_checkpoint_ranks`.)

    It sees to it that local files are written so that a run killed at any moment, or a full disk, leaves the previous
    checkpoint whole, and that a file which is damaged or was changed is not loaded. All checkpoints of a trainer with
    it are of this kind, those of ``trainer.save_checkpoint`` too.

    SIGTERM, as before a job is preempted, lets the step end, saves ``last.ckpt`` in its folder, and raises Lightning's
    SIGTERMException, which ends the program with exit code 0. In a validation of a single process it does so at once,
    and the resumed run makes that validation from its start (if a RankScheduler is there; else Lightning skips it).

    Under FSDP2 it needs ``save_distributed_checkpoint=False``: the adapter is whole in each process anyway.
    """

    _base: dict[str, dict[str, Tensor]] | None = None
    _loaded: frozenset[str] | None = None
    _sigterm: SigtermNotice | None = None
    _seen_step, _has_trained, _stopping = 0, False, False
    _loops: dict[str, Any] | None = None  # as they were after a batch that a validation follows

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what would not write such files; have them written and read safely, and loaded without a base.

        Raises:
            ConfigurationError: if another ModelCheckpoint is there, or FSDP2 writes a folder of shards.
        """
        for other in trainer.checkpoint_callbacks:
            if isinstance(other, ModelCheckpoint) and not isinstance(other, AdapterCheckpoint):
                raise ConfigurationError(
                    f"beside AdapterCheckpoint, {type(other).__name__} would write checkpoints without the base, too; "
                    "take one of the two out, or make both AdapterCheckpoint"
                )
        strategy: Any = trainer.strategy
        if isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint:
            raise ConfigurationError(
                "AdapterCheckpoint cannot leave the base out of a folder of shards; set "
                "save_distributed_checkpoint=False (trainer.strategy.save_distributed_checkpoint=false), which writes "
                "one file without the base, or use ModelCheckpoint"
            )
        if type(strategy.checkpoint_io) is TorchCheckpointIO:  # one that the user has chosen stays
            strategy.checkpoint_io = SafeCheckpointIO()
        for model in [pl_module, *(getattr(c, "_average_model", None) for c in trainer.callbacks)]:  # type: ignore[attr-defined]
            if model is not None:
                follow_base(model)
        self._loaded = None
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero and self.dirpath and Path(self.dirpath).is_dir():
            for left in Path(self.dirpath).glob(f"*{self.FILE_EXTENSION}{PART}"):  # by a process that was killed
                left.unlink()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("state_dict")
        self._loaded = frozenset(left_out(state)) if state else None  # FSDP2 has taken it out by now
        super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the fingerprint of the base, before the first step.

        Raises:
            ConfigurationError: if there is no adapted model.
        """
        bases = frozen_bases(pl_module)
        if not bases:
            raise ConfigurationError(
                "AdapterCheckpoint needs a model with LoRA layers (dynrank.add_lora or PEFT); use ModelCheckpoint"
            )
        self._base = {
            root: {name: sampled(p) for name, p in parameters.items() if self._is_base(root, name)}
            for root, parameters in bases.items()
        }
        self._sigterm, self._loops, self._stopping = SigtermNotice(), None, False
        super().on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen_step, self._has_trained = trainer.global_step, False
        if self._sigterm is not None:
            self._sigterm.take_over()
        super().on_train_start(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._sigterm is not None and trainer.state.fn == "fit":  # it may come before the start of training
            self._sigterm.take_over()
        super().on_validation_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        complete, self._seen_step = trainer.global_step > self._seen_step, trainer.global_step
        self._loops, self._has_trained = None, True
        if complete and self._sigterm is not None and self._sigterm.received(trainer):
            trainer._logger_connector.on_batch_end()  # what Lightning logs of a step it logs after this hook
            trainer._logger_connector.update_train_step_metrics()
            self._save_and_stop(trainer)
        if complete and trainer.world_size == 1 and is_due(trainer):
            self._loops = {"fit_loop": deepcopy(trainer.fit_loop.state_dict())}

    def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if trainer.world_size == 1 and trainer.state.fn == "fit" and not trainer.sanity_checking:
            if self._sigterm is None or not self._sigterm.received(trainer):
                return
            if self._loops is not None:
                self._save_and_stop(trainer)
            if not self._has_trained:  # a validation that the checkpoint resumed from had still to come
                raise SIGTERMException

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._base is not None:
            for key in _STATES:
                if key in checkpoint:
                    checkpoint[key] = without_base(pl_module, checkpoint[key], self._base)
        if self._stopping and self._loops is not None:
            checkpoint["loops"].update(self._loops)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def _save_and_stop(self, trainer: Trainer) -> None:
        path = str(Path(self.dirpath or ".") / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")
        if (self._last_checkpoint_saved, self._last_global_step_saved) != (path, trainer.global_step):
            self._stopping = True
            self._save_checkpoint(trainer, path)
        raise SIGTERMException

    def _is_base(self, root: str, name: str) -> bool:
        """Not what a checkpoint had to bring along because it had changed."""
        return not self._loaded or name in self._loaded


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
