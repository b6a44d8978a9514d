"""Files that are complete or absent: they are written under another name and then renamed."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

PART = ".part"
# The numbers of the errors of a disk that is full.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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

    So ``path`` always holds the complete new file, or its old content. Every writer has a path of its own, which ends
    in ".part"; an error removes it, and a process that is killed leaves it behind.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{uuid4().hex[:8]}{PART}")
    try:
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
