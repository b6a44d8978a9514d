"""Files that are whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

__all__ = ["PART", "os_errors", "whole_file", "whole_files"]

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
    of one path, in one process or more, each waits until those before it are done.

    Raises:
        OSError: if the file cannot be brought to the disk or moved.
    """
    with whole_files(path) as (part,):
        yield part


@contextmanager
def whole_files(*paths: str | Path) -> Iterator[list[Path]]:
    """The same for several files that belong together: all are on the disk before the first is moved.

    So another process sees old files beside new ones for no longer than the moves take.
    """
    parts = {Path(path): Path(f"{path}{PART}") for path in paths}
    with ExitStack() as held:
        for part in parts.values():
            held.enter_context(_alone(part))
        try:
            yield list(parts.values())
            for part in parts.values():
                with part.open("rb") as written:
                    os.fsync(written.fileno())
            for path, part in parts.items():
                os.replace(part, path)
        except BaseException:
            for part in parts.values():
                with suppress(OSError):
                    part.unlink(missing_ok=True)
            raise
    for folder in {path.parent for path in parts}:
        _sync_folder(folder)


@contextmanager
def _alone(part: Path) -> Iterator[None]:
    """Wait for other writers of ``part`` and keep them out; whatever ends this process lets go of it."""
    while True:
        with part.open("ab") as file, _locked(file.fileno()):
            if _is(file.fileno(), part):
                yield
                return


def _is(handle: int, path: Path) -> bool:
    """Whether an open file is the one at ``path``: another writer may have moved it to its place, or removed it."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _locked(handle: int) -> Iterator[None]:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        yield  # a file system without locks: there nobody is kept out
        return
    try:
        yield
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)  # a process that was forked meanwhile would hold it on


def _sync_folder(folder: Path) -> None:
    """Bring the move itself to the disk, where folders can be opened."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
