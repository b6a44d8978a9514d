"""The folder of a run: a new folder for each run, or the folder of an interrupted run that is resumed.

While a resumed run trains, its earlier ``metrics.csv`` has the name ``metrics.earlier.csv``, because Lightning begins
that file again.
"""

import csv
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dynrank.errors import ConfigurationError
from dynrank.output.whole_file import PART, whole_file
from dynrank.run.summary import SUMMARY

METRICS, EARLIER = "metrics.csv", "metrics.earlier.csv"
HISTORY, GENERATIONS, LOCK = "rank_history.csv", "generations.csv", ".lock"


def last_checkpoint(folder: Path) -> Path:
    """Path of the last checkpoint of the run in ``folder``."""
    return folder / "checkpoints" / "last.ckpt"


def checkpoint_of(folder: Path, ckpt_path: str | None) -> Path | None:
    """The checkpoint file that ``ckpt_path`` means for a run in ``folder``."""
    if ckpt_path != "last":
        return Path(ckpt_path) if ckpt_path is not None else None
    path = last_checkpoint(folder)
    if not path.is_file():
        raise ConfigurationError(
            f"ckpt_path=last: {str(folder)!r} holds no run with a checkpoint; set hydra.run.dir to the folder of the "
            "run to resume, or ckpt_path=null to begin a new run"
        )
    if (folder / SUMMARY).exists():
        raise ConfigurationError(
            f"ckpt_path=last: the run in {str(folder)!r} has ended; to train on, set hydra.run.dir to a new folder and "
            f"ckpt_path={path}"
        )
    return path


@contextmanager
def held(folder: Path, goes_on_from: int | None = None) -> Iterator[None]:
    """Lock ``folder`` against other processes during a run.

    A new run replaces one that was killed before its first checkpoint. If a run is resumed after ``goes_on_from``
    optimizer steps, rows of later steps are removed from the tables.
    """
    with _locked(folder):
        checkpoints = [file for file in folder.glob("checkpoints/*") if file.suffix != PART]
        if goes_on_from is not None:
            take_up(folder, goes_on_from)
        elif checkpoints or (folder / SUMMARY).exists():
            raise ConfigurationError(
                f"{str(folder)!r} holds a run already; set hydra.run.dir (of a sweep hydra.sweep.dir) to a new folder, "
                "or ckpt_path=last to resume that run"
            )
        else:
            _empty(folder)
        try:
            yield
        # Some values are refused only when training starts.
        except ConfigurationError:
            if goes_on_from is None and not (folder / METRICS).exists():
                _empty(folder)
            raise


def take_up(folder: Path, step: int) -> None:
    """Remove from the tables of ``folder`` the rows of ``step`` and later, before its run is resumed there."""
    metrics = _joined(_read(folder / EARLIER), _read(folder / METRICS))
    tables = {EARLIER: metrics, GENERATIONS: _read(folder / GENERATIONS)}
    for name, rows in tables.items():
        # A text that was generated after n steps has step n in its row, but a metric has step n - 1.
        end = step + (name == GENERATIONS)
        _write(folder / name, [row for row in rows if int(row["step"]) < end])
    (folder / METRICS).unlink(missing_ok=True)


def join(folder: Path) -> None:
    """Put the rows that :func:`take_up` has set aside before the rows recorded since."""
    if (folder / EARLIER).exists():
        _write(folder / METRICS, _joined(_read(folder / EARLIER), _read(folder / METRICS)))
        (folder / EARLIER).unlink()


def _empty(folder: Path) -> None:
    """Remove the files that a run may have written before its first checkpoint."""
    for name in (METRICS, EARLIER, GENERATIONS, HISTORY):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock in ``folder``; it is released however this process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"no run can be made in {str(folder)!r}: {error.strerror}; set hydra.run.dir (of a sweep hydra.sweep.dir) "
            "to another folder"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigurationError(
                f"{str(folder)!r} is in use by {file.read() or 'another process'}; wait for its end, or set "
                "hydra.run.dir (of a sweep hydra.sweep.dir) to another folder"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _joined(before: list[dict[str, str]], after: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows of both, without rows of ``before`` that ``after`` repeats, as after a repeated validation."""

    def subject(row: dict[str, str]) -> tuple[str, ...]:
        return (row["step"], *sorted(name for name, value in row.items() if value))

    again = {subject(row) for row in after}
    return [row for row in before if subject(row) not in again] + after


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        # A line that was cut short by a kill is left out.
        return [row for row in csv.DictReader(file) if (row.get("step") or "").isdigit()]


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    """Write a table. Delete the file if there are no rows; the next writer then creates it with a header."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    names = list(dict.fromkeys(name for row in rows for name in row if name))
    with whole_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
