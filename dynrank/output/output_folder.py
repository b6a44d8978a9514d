"""The folder of a command's --out: there when it is whole, or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from os.path import realpath
from pathlib import Path

from dynrank.errors import ConfigurationError
from dynrank.output.whole_file import os_errors

__all__ = ["check_free", "whole_or_nothing"]


def check_free(out: Path, *sources: Path) -> None:
    """Refuse a folder to write to that holds something, or is one of those that are read.

    Raises:
        ConfigurationError: naming it.
    """
    with _naming(out):
        if realpath(out) in [*map(realpath, sources)]:
            raise ConfigurationError(f"--out must be another folder than is read from, got {str(out)!r} for both")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigurationError(f"--out must be a new or empty folder, {str(out)!r} is not")


@contextmanager
def whole_or_nothing(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` to write to, which takes its name at the end of the block.

    An error leaves nothing; what a killed process left is replaced.

    Raises:
        ConfigurationError: if another process writes to ``out``, or a file or folder cannot be written.
    """
    with _naming(out):
        out = Path(realpath(out))  # Path.resolve has no OSError for a link to itself
        part = out.parent / f".{out.name}.part"
        part.mkdir(parents=True, exist_ok=True)
        with _held(part, out):
            try:
                for left in part.iterdir():
                    left.unlink()
                yield part
                for file in part.iterdir():
                    file.chmod(part.stat().st_mode & 0o666)  # safetensors lets nobody else read its files
                os.rename(part, out)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise


@contextmanager
def _naming(out: Path) -> Iterator[None]:
    try:
        with os_errors(out):
            yield
    except OSError as error:
        raise ConfigurationError(f"cannot write to --out {str(out)!r}: {error.strerror or error}") from None


@contextmanager
def _held(part: Path, out: Path) -> Iterator[None]:
    """Hold ``part`` against other processes; whatever ends this one lets go of it."""
    if part.is_symlink():  # its files would be another folder's
        raise ConfigurationError(f"{str(part)!r} must not be a link, since --out is written there first; remove it")
    handle = os.open(part, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(handle), part.lstat())  # or another process has just finished with it
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:
            raise ConfigurationError(f"--out must be a folder that no other process writes to, got {str(out)!r}")
        yield
    finally:
        os.close(handle)
