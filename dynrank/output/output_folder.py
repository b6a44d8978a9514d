"""A new folder or file ``out``, which is written completely or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from os.path import realpath
from pathlib import Path
from tempfile import TemporaryDirectory

from dynrank.errors import ConfigurationError
from dynrank.output.whole_file import PART, os_errors, whole_file


def check_free(out: Path, *sources: Path) -> None:
    """Refuse an output folder that is not empty, or is one of the ``sources``."""
    with _naming(out):
        if realpath(out) in [*map(realpath, sources)]:
            raise ConfigurationError(
                f"out must be another folder than the one to read, got {str(out)!r} for both", "out"
            )
        if out.exists() and (not out.is_dir() or any(file.suffix != PART for file in out.iterdir())):
            raise ConfigurationError(f"out must be a new or empty folder, got {str(out)!r}", "out")


@contextmanager
def whole_or_nothing(out: Path) -> Iterator[Path]:
    """A folder to write to, which is renamed to ``out`` at the end of the block, or deleted after an error.

    If ``out`` exists, its files are moved there one by one, because the present folder and a mounted disk cannot be
    replaced. A killed process leaves a folder behind whose name ends in ".part".
    """
    with _naming(out):
        # Unlike realpath, Path.resolve raises no OSError for a link to itself.
        out = Path(realpath(out))
        home = out if out.is_dir() else out.parent
        if not os.path.lexists(home):
            home.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(PART, f"{out.name}.", home, ignore_cleanup_errors=True) as place:
            # Only the owner can read a temporary folder, unlike one that is made in it.
            folder = Path(place, out.name)
            folder.mkdir()
            yield folder
            for file in folder.iterdir():
                # safetensors makes files that only their owner can read.
                file.chmod(folder.stat().st_mode & 0o666)
            # Another writer may have ended first.
            check_free(out)
            for part in [*folder.iterdir()] if home == out else [folder]:
                os.rename(part, home / part.name)


@contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """A path to write to, which is renamed to ``out`` at the end of the block, or deleted after an error."""
    with _naming(out):
        if os.path.lexists(out):
            raise ConfigurationError(f"out must be a new file, {str(out)!r} exists", "out")
        out.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(out) as part:
            part.touch()
            mode = part.stat().st_mode
            yield part
            # safetensors makes files that only their owner can read.
            part.chmod(mode)


@contextmanager
def _naming(out: Path) -> Iterator[None]:
    """Turn an OSError within the block into a ConfigurationError that names ``out``."""
    try:
        with os_errors(out):
            yield
    except OSError as error:
        raise ConfigurationError(f"cannot write to out {str(out)!r}: {error.strerror or error}", "out") from error
