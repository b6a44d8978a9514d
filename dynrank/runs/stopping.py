"""The end of a run that SIGTERM or Ctrl-C stops: a line that says how to resume it."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from dynrank.runs.command import command, override
from dynrank.runs.folder import last_checkpoint

# AdapterCheckpoint saves after the step in which one of them comes.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stoppable(trainer: Trainer, checkpoint: Path | None, folder: Path | None = None) -> Iterator[None]:
    """Say how to resume a run that ends within the block by Ctrl-C, which is raised again, or by SIGTERM in training.

    ``trainer`` has an AdapterCheckpoint for STOP_SIGNALS. ``checkpoint`` is the one from which the run itself was
    resumed.
    """
    saver: Any = trainer.checkpoint_callback
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        # Outside of training steps, Lightning turns Ctrl-C into exit code 1.
        pressed = saver.stopped_by == signal.SIGINT or KeyboardInterrupt in (type(stop), type(stop.__context__))
        if not pressed and not isinstance(stop, SIGTERMException):
            raise
        if trainer.is_global_zero:
            saved = saver.last_saved or checkpoint
            advice = _advice(str(saved), folder) if saved else "there is no checkpoint yet"
            name = "Ctrl-C" if pressed else "SIGTERM"
            print(f"{name}: stopped after step {trainer.global_step}; {advice}", file=sys.stderr)
        if pressed:
            raise KeyboardInterrupt from stop
        raise


def _advice(saved: str, folder: Path | None) -> str:
    """How to resume: a command to paste if the run was started by a command, otherwise a key."""
    changes = [override("ckpt_path", saved)]
    if folder is not None and saved == str(last_checkpoint(folder)):
        changes = ["ckpt_path=last", override("hydra.run.dir", folder)]
    return f"go on with {(folder and command(folder, *changes)) or changes[0]}"
