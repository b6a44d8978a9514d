"""Tables, and ranges of numbers, for people."""

from collections.abc import Collection

from rich.console import Console
from rich.table import Table


def table_console() -> Console:
    """A console as wide as the terminal, or 180 columns for a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=180)


def empty_table(title: str, *headings: str, texts: Collection[str] = ()) -> Table:
    """A table without rows; its first column and the columns ``texts`` are aligned left, all others right."""
    table = Table(title=title, caption_justify="left")
    for index, heading in enumerate(headings):
        text = index == 0 or heading in texts
        width = 20 if heading == "layer" else None
        table.add_column(heading, justify="left" if text else "right", overflow="fold", min_width=width)
    return table


def table_text(table: Table) -> str:
    """``table`` as a text, as an interactive session shows it."""
    console = table_console()
    with console.capture() as printed:
        console.print(table)
    return printed.get().rstrip()


def print_table(table: Table) -> None:
    """Print ``table`` in the width of :func:`table_console`."""
    table_console().print(table)


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
