"""Counts of a run's data by split, and results of its test by class: for printed tables and for summary.json."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import field
from typing import Any
from unicodedata import normalize

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from rich.markup import escape

from dynrank.app.console import one_line
from dynrank.output.console import empty_table, print_table

# How many classes a printed table shows.
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
        ambiguous: {label: number of its texts that have it in some of their rows, and not in others}.
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
    ambiguous: dict[str, int] = field(default_factory=dict)


def print_account(splits: Mapping[str, SplitAccount]) -> None:
    """Print a line for each split, and one for each of the most frequent classes, and of those with a remark."""
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
        remarks = _remarks(splits.values())
        texts = ["remark"] if remarks else []
        table = empty_table(f"{len(every):,} classes", "label", *splits, *texts, texts=texts)
        frequent = [*every][:_CLASSES]
        # Rare classes often have a remark.
        named = [*frequent, *[name for name in [*every][_CLASSES:] if name in remarks][:_CLASSES]]
        for name in named:
            counts = (f"{split.classes.get(name, 0):,}" for split in splits.values())
            table.add_row(escape(quoted(name)), *counts, *([escape(remarks.get(name, ""))] if remarks else []))
        if len(every) > len(named):
            table.add_row(f"and {len(every) - len(named):,} more", *[""] * (len(splits) + len(texts)))
        print_table(table)


def _remarks(splits: Collection[SplitAccount]) -> dict[str, str]:
    """{class: what is strange about it}."""
    counts = Counter[str]()
    ambiguous = Counter[str]()
    for split in splits:
        counts.update(split.classes)
        ambiguous.update(split.ambiguous)
    alike: dict[str, list[str]] = {}
    for name in counts:
        alike.setdefault("".join(normalize("NFKC", name).casefold().split()), []).append(name)
    found: dict[str, list[str]] = {name: [] for name in counts}
    for names in alike.values():
        for name in names:
            others = " and ".join(quoted(other) for other in names if other != name)
            found[name] += [f"as {others} but for case, blanks or Unicode form"] if others else []
    for name, count in counts.items():
        found[name] += ["one row"] if count == 1 else []
    for name, count in ambiguous.items():
        found[name].append(f"{count:,} {'text has' if count == 1 else 'texts have'} other labels in other rows")
    return {name: "; ".join(said) for name, said in found.items() if said}


def quoted(label: str) -> str:
    """A label in one line, in quotes if it would be taken for a number, or its blanks not be seen.

    >>> quoted("billing"), quoted("007"), quoted("late bill")
    ('billing', "'007'", "'late bill'")
    """
    return repr(label) if not label or label.isdecimal() or " " in label else one_line(label)


@dataclass(config=ConfigDict(strict=True, extra="ignore"))
class ClassResult:
    """The result for one class.

    Attributes:
        texts: number of test texts of the class.
        precision: share of the texts with this answer that are of the class.
        recall: share of the texts of the class that have this answer.
        f1: harmonic mean of precision and recall.
        answers: {class: for how many texts of this class it was the answer}, the most frequent first: the row of the
            confusion matrix without zeros. Empty where a text may have several labels.
    """

    texts: int
    precision: float
    recall: float
    f1: float
    answers: dict[str, int] = field(default_factory=dict)

    def taken_for(self, own: str) -> str:
        """The most frequent wrong answer with its number; "" if there is none. ``own`` is the name of the class."""
        return next((f"{quoted(name)} ({count:,})" for name, count in self.answers.items() if name != own), "")


def class_results(found: Mapping[str, Any], labels: Sequence[str]) -> dict[str, ClassResult]:
    """{class: its result} for each class that a test text has.

    Args:
        found: ``precision``, ``recall``, ``f1`` and ``confusion`` of torchmetrics, as lists over the classes.
        labels: names of the classes.
    """
    results = {}
    for i, label in enumerate(labels):
        counts = found["confusion"][i]
        # Of several labels each has a matrix of its own, [[true no, false yes], [false no, true yes]].
        several = isinstance(counts[0], list)
        answers = {} if several else {labels[k]: count for k, count in enumerate(counts) if count}
        texts = sum(counts[1]) if several else sum(counts)
        ordered = dict(sorted(answers.items(), key=lambda pair: -pair[1]))
        if texts:
            scores = {name: found[name][i] for name in ("precision", "recall", "f1")}
            results[label] = ClassResult(texts, answers=ordered, **scores)
    return results


def print_classes(results: Mapping[str, ClassResult]) -> None:
    """Print a line for each class, the lowest F1 first."""
    worst = sorted(results, key=lambda name: results[name].f1)[:_CLASSES]
    which = f"{len(worst)} of {len(results)} classes" if len(worst) < len(results) else f"{len(results)} classes"
    texts = ["mostly taken for"]
    headings = ("class", "texts", "precision", "recall", "F1")
    table = empty_table(f"{which} in the test, lowest F1 first", *headings, *texts, texts=texts)
    for name in worst:
        found = results[name]
        scores = (f"{value:.3f}" for value in (found.precision, found.recall, found.f1))
        table.add_row(escape(quoted(name)), f"{found.texts:,}", *scores, escape(found.taken_for(name)))
    print_table(table)
