"""The folder of a run: a new one for each, or the one of an interrupted run that goes on where it stands.

Of a run that goes on in its folder, ``metrics.csv`` is set aside as ``metrics.earlier.csv`` until it ends, since
Lightning writes that file from its beginning.
"""

from __future__ import annotations

import csv
import os
from contextlib import suppress
from pathlib import Path

from dynrank.errors import ConfigurationError

METRICS, EARLIER, PREDICTIONS = "metrics.csv", "metrics.earlier.csv", "rank_predictions.csv"
HISTORY = "rank_history.csv"


def checkpoint_of(folder: Path, ckpt_path: str | None) -> Path | None:
    """The checkpoint file that ``ckpt_path`` means for a run in ``folder``.

    Raises:
        ConfigurationError: if it is "best", or "last" where ``folder`` holds no run, one without a checkpoint or one
            that has ended.
    """
    if ckpt_path == "best":
        raise ConfigurationError(
            "ckpt_path=best: dynrank-train keeps the last checkpoint alone; set ckpt_path=last and hydra.run.dir, or "
            "ckpt_path to a file"
        )
    if ckpt_path != "last":
        return Path(ckpt_path) if ckpt_path is not None else None
    path = folder / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise ConfigurationError(
            f"ckpt_path=last: {str(folder)!r} holds no run with a checkpoint; set hydra.run.dir to the folder of the "
            "run that is to go on, or ckpt_path=null to begin one"
        )
    if (folder / "summary.json").exists():
        raise ConfigurationError(
            f"ckpt_path=last: the run in {str(folder)!r} has ended; to train on, set hydra.run.dir to a new folder and "
            f"ckpt_path={path}"
        )
    return path


def claim(folder: Path) -> None:
    """Make ``folder`` the place of a new run.

    Raises:
        ConfigurationError: if it holds one already.
    """
    try:
        (folder / "checkpoints").mkdir(parents=True)
    except FileExistsError:
        raise ConfigurationError(
            f"{str(folder)!r} holds a run already; set hydra.run.dir (of a sweep hydra.sweep.dir) to a new folder, or "
            "ckpt_path=last to go on there"
        ) from None


def release(folder: Path) -> None:
    """Let a new run :func:`claim` the ``folder`` of one that was killed before its first checkpoint."""
    place = folder / "checkpoints"
    if not place.exists():
        return
    for file in (*(folder / name for name in (METRICS, EARLIER, PREDICTIONS, HISTORY)), *place.glob("*.part")):
        file.unlink(missing_ok=True)
    with suppress(OSError):  # not empty: it is no folder that such a run leaves, and claim says so
        place.rmdir()


def take_up(folder: Path, step: int) -> None:
    """Leave in the tables of ``folder`` what was recorded before ``step``, where its run goes on."""
    for name, kept in ((METRICS, EARLIER), (PREDICTIONS, PREDICTIONS)):
        if (folder / name).exists():
            before = _read(folder / kept) if kept != name else []
            rows = [row for row in _joined(before, _read(folder / name)) if int(row["step"]) < step]
            _write(folder / kept, rows)
            if kept != name:
                (folder / name).unlink()


def join(folder: Path) -> None:
    """Put what :func:`take_up` has set aside before what was recorded since."""
    if (folder / EARLIER).exists():
        _write(folder / METRICS, _joined(_read(folder / EARLIER), _read(folder / METRICS)))
        (folder / EARLIER).unlink()


def _joined(before: list[dict[str, str]], after: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows of both; of two that say the same of one step (a validation made again), the later one."""
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for row in [*before, *after]:
        names = sorted(name for name, value in row.items() if value)
        rows[row["step"], row.get("layer", ""), *names] = row
    return list(rows.values())


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if (row.get("step") or "").isdigit()]  # not a line cut short


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row if name))
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, path)
