"""The result of a test for each class: precision, recall, F1, and which classes were answered."""

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from rich.markup import escape

from dynrank.output.console import empty_table, one_line, print_table

# How many classes the printed table shows.
_SHOWN = 20


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
        return next((f"{one_line(name)} ({count:,})" for name, count in self.answers.items() if name != own), "")


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
    worst = sorted(results, key=lambda name: results[name].f1)[:_SHOWN]
    which = f"{len(worst)} of {len(results)} classes" if len(worst) < len(results) else f"{len(results)} classes"
    texts = ["mostly taken for"]
    headings = ("class", "texts", "precision", "recall", "F1")
    table = empty_table(f"{which} in the test, lowest F1 first", *headings, *texts, texts=texts)
    for name in worst:
        found = results[name]
        scores = (f"{value:.3f}" for value in (found.precision, found.recall, found.f1))
        table.add_row(escape(one_line(name)), f"{found.texts:,}", *scores, escape(found.taken_for(name)))
    print_table(table)
