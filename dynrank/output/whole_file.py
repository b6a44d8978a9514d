"""Files that are whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

PART = ".part"


@contextmanager
def os_errors(path: str | Path) -> Iterator[None]:
    """Raise as an OSError of ``path`` what safetensors cannot write within the block: it hides the error's number."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from None


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path to write to; what is there at the end of the block takes the place of ``path`` in one step.

    Whatever happens on the way, ``path`` holds the new file whole, or what it held before. A process killed within the
    block leaves ``path`` + ".part" behind, which the next write replaces; an error leaves nothing. Of several writers
    to one folder, in one process or more, each waits until those before it are done.
    """
    with whole_files(path) as (part,):
        yield part


@contextmanager
def whole_files(*paths: str | Path) -> Iterator[list[Path]]:
    """Paths for several files of one folder, as in :func:`whole_file`: all are on the disk before the first is moved.

    So another process sees old files beside new ones for no longer than the moves take.
    """
    parts = {Path(path): Path(f"{path}{PART}") for path in paths}
    with _alone_in(next(iter(parts)).parent) as folder:
        try:
            yield list(parts.values())
            for part in parts.values():
                with part.open("rb") as written:
                    os.fsync(written.fileno())
            for path, part in parts.items():
                os.replace(part, path)
            # Syncing the folder makes the moves themselves durable.
            os.fsync(folder)
        except BaseException:
            for part in parts.values():
                with suppress(OSError):
                    part.unlink(missing_ok=True)
            raise


@contextmanager
def _alone_in(folder: Path) -> Iterator[int]:
    """Wait for other writers to ``folder`` and keep them out; nobody is kept out where the file system has no locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        with suppress(OSError):
            # A process that was forked meanwhile holds the handle, too, so closing it would not unlock.
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)
