"""What can be measured of a language model's answers: metrics of torchmetrics, by the name that they are logged as."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.text import Perplexity, SacreBLEUScore

from dynrank.tasks.adapter_module import IGNORED
from dynrank.tasks.python_source import parsed


class Share(Metric):
    """Share of the examples for which ``holds(prediction, target, prompt)`` is true."""

    held: Tensor
    counted: Tensor

    def __init__(self, holds: Callable[[Any, Any, str], bool]) -> None:
        super().__init__()
        self.holds = holds
        for name in ("held", "counted"):
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, preds: Any, target: Any, prompts: Sequence[str] | None = None) -> None:
        """Add a batch: predictions and targets, one of each for every example, and the prompts of texts."""
        found = [self.holds(*example) for example in zip(preds, target, prompts or [""] * len(preds), strict=True)]
        self.held += sum(found)
        self.counted += len(found)

    def compute(self) -> Tensor:
        return self.held / self.counted


def whole_answer(logits: Tensor, labels: Tensor, prompt: str) -> bool:
    """Whether greedy decoding writes the answer and its end, and nothing else.

    One forward tells: if each token of the answer is the most probable one behind the true ones before it, greedy
    decoding writes just these. Logits (length, vocabulary) and labels (length,) are of what comes next.
    """
    return bool(((logits.argmax(-1) == labels) | (labels == IGNORED)).all())


def first_line(text: str, answers: Sequence[str], prompt: str) -> bool:
    """Whether the first line that is not blank is the answer's, blanks around it aside."""
    written, right = (next((line.strip() for line in t.split("\n") if line.strip()), "") for t in (text, answers[0]))
    return written == right


def python(text: str, answers: Sequence[str], prompt: str) -> bool:
    """Whether something was written, and is Python behind its prompt."""
    return bool(text) and parsed(prompt + text) is not None


# The first are of the logits and labels of an evaluation, the others of texts that greedy decoding writes.
Metrics = dict[str, Callable[[], Metric]]
OF_LOGITS: Metrics = {"accuracy": partial(Share, whole_answer), "perplexity": partial(Perplexity, ignore_index=IGNORED)}
OF_TEXTS: Metrics = {
    "bleu": SacreBLEUScore,
    "exact_match": partial(Share, first_line),
    "parses": partial(Share, python),
}


def chosen(names: Sequence[str], table: Metrics, prefix: str) -> MetricCollection:
    """Those metrics of ``table`` that have these names, logged behind ``prefix``."""
    made: Any = {name: table[name]() for name in names if name in table}
    # Metrics are not grouped, because two shares may be equal by chance.
    return MetricCollection(made, prefix=prefix, compute_groups=False)
