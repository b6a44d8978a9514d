"""What the commands print on: tables, ranges of numbers, and silence while libraries are imported."""

from __future__ import annotations

import logging
from collections.abc import Collection

from rich.console import Console


def table_console() -> Console:
    """The terminal; or, for a file or a pipe, lines with room for whole names of layers."""
    console = Console()
    return console if console.is_terminal else Console(width=180)


def span(numbers: Collection[int]) -> str:
    """One number, or the smallest and the largest of several.

    >>> span([16]), span([1, 4000, 2])
    ('16', '1-4,000')
    """
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def quiet_imports() -> None:
    """Keep libraries from talking while they are imported: of a font cache, and of kernels that nothing here needs."""
    for name in ("matplotlib", "alembic"):  # the latter one of Optuna's
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # the last one of torchao's own classes
        logging.getLogger(name).setLevel(logging.ERROR)
