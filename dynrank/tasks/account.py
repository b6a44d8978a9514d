"""What the data of a run came to, by split: the table before training, and the numbers in summary.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from rich.markup import escape

from dynrank.output.console import empty_table, one_line, print_table

# So many classes are shown in the table.
_CLASSES = 20


@dataclass(config=ConfigDict(strict=True, extra="ignore"))
class SplitAccount:
    """What a split came to.

    Attributes:
        rows: of the split.
        examples: made of them and used; several texts may share one.
        tokens: in these.
        max_length: tokens that an example may have.
        dropped: rows that were left out, since their text stands in another split's file.
        left_out: rows that were left out, since they have more tokens.
        cut: texts that were cut, since they have more tokens.
        classes: how many rows have each label.
    """

    rows: int
    examples: int
    tokens: int
    max_length: int
    dropped: int = 0
    left_out: int = 0
    cut: int = 0
    classes: dict[str, int] = field(default_factory=dict)


def print_account(splits: Mapping[str, SplitAccount]) -> None:
    """Print a line for each split, and one for each of the most frequent classes."""
    length = max(split.max_length for split in splits.values())
    columns = {
        "rows": "rows",
        "in another split": "dropped",
        f"longer than {length}, left out": "left_out",
        f"longer than {length}, cut": "cut",
        "examples": "examples",
        "tokens": "tokens",
    }
    numbers = {heading: [getattr(split, name) for split in splits.values()] for heading, name in columns.items()}
    numbers = {heading: column for heading, column in numbers.items() if any(column)}
    table = empty_table("data", "split", *numbers)
    for name, *row in zip(splits, *numbers.values(), strict=True):
        table.add_row(name, *(f"{number:,}" for number in row))
    print_table(table)
    every = {name: None for split in splits.values() for name in split.classes}
    if every:
        table = empty_table(f"{len(every):,} classes", "label", *splits)
        for name in [*every][:_CLASSES]:
            table.add_row(escape(one_line(name)), *(f"{split.classes.get(name, 0):,}" for split in splits.values()))
        if len(every) > _CLASSES:
            table.add_row(f"and {len(every) - _CLASSES:,} more", *[""] * len(splits))
        print_table(table)
