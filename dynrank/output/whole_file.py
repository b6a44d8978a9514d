"""Files that are complete or absent: they are written under another name and then renamed."""

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
    """Turn a SafetensorError of a failed write within the block into an OSError of ``path`` with its error number."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from None


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path to write to; at the end of the block this file replaces ``path`` in one step.

    So ``path`` always holds the complete new file, or its old content. A process that is killed within the block leaves
    ``path`` + ".part" behind, which the next write replaces; an error leaves nothing. Several writers to one folder, in
    one or more processes, wait for each other.
    """
    with whole_files(path) as (part,):
        yield part


@contextmanager
def whole_files(*paths: str | Path) -> Iterator[list[Path]]:
    """Paths for several files of one folder, as in :func:`whole_file`; all are on the disk before the first is renamed.

    So another process can see old and new files together only while they are renamed.
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
            # This makes the new names durable.
            os.fsync(folder)
        except BaseException:
            for part in parts.values():
                with suppress(OSError):
                    part.unlink(missing_ok=True)
            raise


@contextmanager
def _alone_in(folder: Path) -> Iterator[int]:
    """Wait for other writers to ``folder`` and lock it; no lock on a file system that does not support locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        with suppress(OSError):
            # A forked process may have the handle, too, and then closing it here does not unlock.
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)
