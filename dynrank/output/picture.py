"""The picture that a command's --plot asks for."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dynrank.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["check_plot", "save_plot"]

_FORMATS = (".png", ".pdf", ".svg")


def check_plot(file: Path) -> None:
    """Refuse a picture that could not be written, before the work that it is to show.

    Raises:
        ConfigurationError: if matplotlib is missing, or ``file`` has no folder or another kind of name.
    """
    if find_spec("matplotlib") is None:
        raise ConfigurationError("--plot needs matplotlib: pip install 'dynrank[plots]'")
    if file.suffix.lower() not in _FORMATS:
        raise ConfigurationError(f"--plot must end in one of {_FORMATS}, got {str(file)!r}")
    if not file.parent.is_dir() or file.is_dir():
        raise ConfigurationError(f"--plot must be a file in a folder that exists, got {str(file)!r}")


def save_plot(figure: Figure, file: Path) -> None:
    """Write a figure to ``file``.

    Raises:
        ConfigurationError: if it cannot be written.
    """
    try:
        figure.savefig(file)
    except OSError as error:
        raise ConfigurationError(f"cannot write --plot {str(file)!r}: {error.strerror or error}") from None
