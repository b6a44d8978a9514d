"""The end of a run that SIGTERM or Ctrl-C stops: a checkpoint, and a line that says how to resume it."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from dynrank.run.command import command, override
from dynrank.run.folder import last_checkpoint


class CtrlC(Callback):
    """Ends training at Ctrl-C as SIGTERM does: AdapterCheckpoint saves after the step. A second Ctrl-C ends at once."""

    pressed = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            # Lightning's teardown puts the earlier handler back.
            signal.signal(signal.SIGINT, self._stop)

    def _stop(self, *_: Any) -> None:
        self.pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def stoppable(trainer: Trainer | None, checkpoint: Path | None, folder: Path | None = None) -> Iterator[None]:
    """Say how to resume a run that SIGTERM or Ctrl-C ends within the block.

    Outside of training, SIGTERM ends it at once. ``trainer`` (None while it is made) has a :class:`CtrlC` and an
    AdapterCheckpoint. ``checkpoint`` is the one from which the run itself was resumed.
    """
    callbacks: list[Any] = trainer.callbacks if trainer is not None else []  # type: ignore[attr-defined]
    main = threading.current_thread() is threading.main_thread()
    # In training, AdapterCheckpoint has a handler of its own.
    earlier = signal.signal(signal.SIGTERM, _end) if main else None
    try:
        yield
    except SystemExit as stop:
        pressed = any(isinstance(c, CtrlC) and c.pressed for c in callbacks)
        # Lightning has received Ctrl-C and turned it into exit code 1.
        pressed = pressed or isinstance(stop.__context__, KeyboardInterrupt)
        if not pressed and not isinstance(stop, SIGTERMException):
            raise
        if trainer is None or trainer.is_global_zero:
            when = "before training" if trainer is None else f"after step {trainer.global_step}"
            saved = trainer.checkpoint_callback.last_saved if trainer else None  # type: ignore[union-attr]
            saved = saved or (str(checkpoint) if checkpoint else None)
            advice = _advice(saved, folder) if saved else "there is no checkpoint yet"
            print(f"{'Ctrl-C' if pressed else 'SIGTERM'}: stopped {when}; {advice}", file=sys.stderr)
        if pressed:
            raise KeyboardInterrupt from stop
        raise
    finally:
        if main:
            signal.signal(signal.SIGTERM, earlier)


def _advice(saved: str, folder: Path | None) -> str:
    """How to resume: a command to paste if the run was started by a command, otherwise a key."""
    changes = [override("ckpt_path", saved)]
    if folder is not None and saved == str(last_checkpoint(folder)):
        changes = ["ckpt_path=last", override("hydra.run.dir", folder)]
    return f"go on with {(folder and command(folder, *changes)) or changes[0]}"


def _end(*_: Any) -> None:
    raise SIGTERMException
