"""Files that are whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["PART", "whole_file"]

PART = ".part"


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path to write to; what is there at the end of the block takes the place of ``path`` in one step.

    Whatever happens on the way, ``path`` holds the new file whole, or what it held before. A process killed within the
    block leaves ``path`` + ".part" behind, which the next write replaces; an error leaves nothing.

    Raises:
        OSError: if the file cannot be brought to the disk or moved.
    """
    path = Path(path)
    part = path.with_name(path.name + PART)
    try:
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Bring the move itself to the disk, where folders can be opened."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
