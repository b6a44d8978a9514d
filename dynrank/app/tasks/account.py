"""Counts of a run's data by split, for a printed table and for summary.json."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import field
from unicodedata import normalize

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from rich.markup import escape

from dynrank.output.console import empty_table, print_table

# How many classes a printed table shows.
_CLASSES = 20
# {a column of the printed table: the attribute with its numbers}.
_COLUMNS = {
    "rows": "rows",
    "unusable": "unusable",
    "in another split": "dropped",
    "too long, left out": "left_out",
    "too long, cut": "cut",
    "examples": "examples",
    "tokens": "tokens",
}


@dataclass(config=ConfigDict(strict=True, extra="ignore"))
class SplitAccount:
    """Counts of a split.

    Attributes:
        rows: rows of the split.
        examples: examples made from the rows; several texts may share one.
        tokens: tokens in the examples.
        unusable: rows that were left out because they cannot be used (``data.skip_unusable``).
        dropped: rows that were left out because their text is also in another split's file.
        left_out: rows that were left out because they have too many tokens.
        cut: texts that were cut because they have too many tokens.
        classes: {label: number of its rows}.
    """

    rows: int
    examples: int
    tokens: int
    unusable: int = 0
    dropped: int = 0
    left_out: int = 0
    cut: int = 0
    classes: dict[str, int] = field(default_factory=dict)


def print_account(splits: Mapping[str, SplitAccount]) -> None:
    """Print a line for each split, each of the most frequent classes, and those that are written nearly alike."""
    numbers = {heading: [getattr(split, name) for split in splits.values()] for heading, name in _COLUMNS.items()}
    numbers = {heading: column for heading, column in numbers.items() if any(column)}
    table = empty_table("data", "split", *numbers)
    for name, *row in zip(splits, *numbers.values(), strict=True):
        table.add_row(name, *(f"{number:,}" for number in row))
    print_table(table)
    counts = Counter[str]()
    for split in splits.values():
        counts.update(split.classes)
    if not counts:
        return
    table = empty_table(f"{len(counts):,} classes, the most frequent first", "label", *splits)
    for name, _ in counts.most_common(_CLASSES):
        of_splits = (f"{split.classes.get(name, 0):,}" for split in splits.values())
        table.add_row(escape(repr(name)), *of_splits)
    print_table(table)
    alike: dict[str, list[str]] = {}
    for name in counts:
        alike.setdefault("".join(normalize("NFKC", name).casefold().split()), []).append(name)
    for names in alike.values():
        if len(names) > 1:
            print(f"labels that differ only by case, blanks or Unicode form: {', '.join(map(repr, names))}")
