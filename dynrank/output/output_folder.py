"""The folder of a command's --out: there when it is whole, or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dynrank.errors import ConfigurationError

__all__ = ["check_free", "whole_or_nothing"]


def check_free(out: Path, *sources: Path) -> None:
    """Refuse a folder to write to that holds something, or is one of those that are read.

    Raises:
        ConfigurationError: naming it.
    """
    if out.resolve() in [source.resolve() for source in sources]:
        raise ConfigurationError(f"--out must be another folder than is read from, got {str(out)!r} for both")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigurationError(f"--out must be a new or empty folder, {str(out)!r} is not")


@contextmanager
def whole_or_nothing(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its name when all went well; one that a killed process left is gone over."""
    out = out.resolve()
    part = out.parent / f".{out.name}.part"
    try:
        part.mkdir(parents=True, exist_ok=True)
        with _held(part, out):
            try:
                for left in part.iterdir():
                    left.unlink()
                yield part
                os.rename(part, out)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
    except OSError as error:
        raise ConfigurationError(f"cannot write to --out {str(out)!r}: {error.strerror or error}") from None


@contextmanager
def _held(part: Path, out: Path) -> Iterator[None]:
    """Hold ``part`` against other processes; whatever ends this one lets go of it."""
    handle = os.open(part, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(handle), part.stat())  # or another process has just finished with it
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:
            raise ConfigurationError(f"--out must be a folder that no other process writes to, got {str(out)!r}")
        yield
    finally:
        os.close(handle)
