"""Output of the commands: tables, facts and ranges of numbers, and silence of libraries."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from dynrank.errors import train_packages

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def table_console() -> Console:
    """A console as wide as the terminal, or 180 columns for a file or a pipe."""
    with train_packages("a table"):
        from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=180)


def empty_table(title: str, *headings: str, texts: Collection[str] = ()) -> Table:
    """A table without rows; its first column and the columns ``texts`` are aligned left, all others right."""
    with train_packages("a table"):
        from rich.table import Table

    table = Table(title=title)
    for index, heading in enumerate(headings):
        text = index == 0 or heading in texts
        width = 20 if heading == "layer" else None
        table.add_column(heading, justify="left" if text else "right", overflow="fold", min_width=width)
    return table


def print_table(table: Table) -> None:
    """Print ``table`` in the width of :func:`table_console`."""
    table_console().print(table)


def print_facts(facts: Mapping[str, object]) -> None:
    """Print one line per fact: its name, then its value."""
    for name, fact in facts.items():
        print(f"{name:<16} {fact}", flush=True)


def one_line(text: str) -> str:
    r"""``text`` with line breaks, terminal codes and other invisible characters escaped.

    >>> print(one_line("a\nb"))
    a\nb
    """
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def span(numbers: Collection[int]) -> str:
    """One number, or the smallest and the largest of several.

    >>> span([16]), span([1, 4000, 2])
    ('16', '1-4,000')
    """
    low = min(numbers)
    high = max(numbers)
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def shape_of_update(num_products: int, *shape: int) -> str:
    """The sizes of a layer's update, and in front of them how many such updates a stack of experts has.

    >>> shape_of_update(1, 768, 384), shape_of_update(8, 768, 384)
    ('768 x 384', '8 x 768 x 384')
    """
    return " x ".join(str(size) for size in (num_products, *shape)[num_products == 1 :])


def quiet_imports() -> None:
    """Silence libraries that log messages while they are imported."""
    # Optuna imports alembic.
    for name in ("matplotlib", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # torch.utils._pytree warns about torchao's classes.
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_loading() -> None:
    """Silence transformers while it loads a model; its warning of a new head is wrong, as the adapter has the head."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
