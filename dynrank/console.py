"""Where tables are printed."""

from __future__ import annotations

from rich.console import Console


def table_console() -> Console:
    """The terminal; or, for a file or a pipe, lines with room for whole names of layers."""
    console = Console()
    return console if console.is_terminal else Console(width=180)
