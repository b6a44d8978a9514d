"""The folder of a run: a new folder for each run, or the folder of an interrupted run that is resumed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from dynrank.app.runs.summary import SUMMARY
from dynrank.errors import ConfigurationError

METRICS = "metrics.csv"
HISTORY = "rank_history.csv"
LOCK = ".lock"
ADAPTER = "adapter"
REPORT = "report.html"
# Every run writes it before any other file.
CONFIG = Path(".hydra") / "config.yaml"


def last_checkpoint(folder: Path) -> Path:
    """Path of the last checkpoint of the run in ``folder``."""
    return folder / "checkpoints" / "last.ckpt"


def checkpoint_of(folder: Path, ckpt_path: str | None) -> Path | None:
    """The checkpoint file that ``ckpt_path`` means for a run in ``folder``."""
    if ckpt_path != "last":
        return Path(ckpt_path) if ckpt_path is not None else None
    path = last_checkpoint(folder)
    if not path.is_file() or (folder / SUMMARY).exists():
        raise ConfigurationError(
            f"ckpt_path=last: {str(folder)!r} must hold a checkpoint of a run that has not ended; set hydra.run.dir to "
            f"its folder, or train on in a new folder with ckpt_path=FILE, such as {path}"
        )
    return path


@contextmanager
def locked(folder: Path, *, resumed: bool) -> Iterator[None]:
    """Lock ``folder`` against other runs; the lock is released however this process ends.

    A new run takes a new or empty folder, and leaves it so if it is refused before its first checkpoint.
    """
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except OSError as error:
        # The time-out of a lock is one without a reason.
        why = error.strerror or "it is in use by another process, or cannot be written to"
        raise ConfigurationError(
            f"no run can be made in {str(folder)!r}: {why}; set hydra.run.dir (of a sweep hydra.sweep.dir) to another "
            "folder"
        ) from None
    try:
        held = sorted(file.name for file in folder.iterdir() if file.name != LOCK)
        if held and not resumed:
            raise ConfigurationError(
                f"a run needs a new or empty folder, {str(folder)!r} holds {', '.join(held[:5])}; set hydra.run.dir "
                "(of a sweep hydra.sweep.dir) to another one, or ckpt_path=last to resume the run that is there"
            )
        try:
            yield
        except ConfigurationError:
            # Some values are refused only when training starts. A run that has diverged later keeps its losses.
            if not (resumed or last_checkpoint(folder).exists() or (folder / METRICS).exists()):
                shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        lock.release()
