"""Counts of a run's data by split, for the table before training and for summary.json."""

from collections.abc import Mapping
from dataclasses import field

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from rich.markup import escape

from dynrank.output.console import empty_table, one_line, print_table

# How many classes the table shows.
_CLASSES = 20


@dataclass(config=ConfigDict(strict=True, extra="ignore"))
class SplitAccount:
    """Counts of a split.

    Attributes:
        rows: rows of the split.
        examples: examples made from the rows and used; several texts may share one.
        tokens: tokens in the examples.
        max_length: largest number of tokens of an example.
        unusable: rows that were left out because they cannot be used (``data.skip_unusable``).
        dropped: rows that were left out because their text is also in another split's file.
        left_out: rows that were left out because they have more than ``max_length`` tokens.
        cut: texts that were cut because they have more than ``max_length`` tokens.
        classes: {label: number of its rows}.
    """

    rows: int
    examples: int
    tokens: int
    max_length: int
    unusable: int = 0
    dropped: int = 0
    left_out: int = 0
    cut: int = 0
    classes: dict[str, int] = field(default_factory=dict)


def print_account(splits: Mapping[str, SplitAccount]) -> None:
    """Print a line for each split, and one for each of the most frequent classes."""
    length = max(split.max_length for split in splits.values())
    columns = {
        "rows": "rows",
        "unusable": "unusable",
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
    every = dict.fromkeys(name for split in splits.values() for name in split.classes)
    if every:
        table = empty_table(f"{len(every):,} classes", "label", *splits)
        for name in [*every][:_CLASSES]:
            table.add_row(escape(one_line(name)), *(f"{split.classes.get(name, 0):,}" for split in splits.values()))
        if len(every) > _CLASSES:
            table.add_row(f"and {len(every) - _CLASSES:,} more", *[""] * len(splits))
        print_table(table)
