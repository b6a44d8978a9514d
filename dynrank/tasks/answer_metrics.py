"""Metrics of a language model's answers, by the names under which they are logged."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.text import Perplexity, SacreBLEUScore

from dynrank.tasks.adapter_module import IGNORED
from dynrank.tasks.data.stdlib import parsed


class Share(MeanMetric):
    """Share of the examples for which ``holds(prediction, target, prompt)`` is true."""

    def __init__(self, holds: Callable[[Any, Any, str], bool]) -> None:
        super().__init__()
        self.holds = holds

    def update(self, preds: Any, target: Any, prompts: Sequence[str] | None = None) -> None:  # type: ignore[override]
        """Add a batch: predictions and targets, one of each for every example, and the prompts of texts."""
        found = [self.holds(*example) for example in zip(preds, target, prompts or [""] * len(preds), strict=True)]
        super().update(torch.tensor(found, dtype=torch.float32, device=self.device))


def whole_answer(logits: Tensor, labels: Tensor, prompt: str) -> bool:
    """Whether greedy decoding generates exactly the answer and its end.

    One forward is enough: if each token of the answer is the most probable one after the true tokens before it, greedy
    decoding generates these tokens. Logits (length, vocabulary) and labels (length,) belong to the next token.
    """
    return bool(((logits.argmax(-1) == labels) | (labels == IGNORED)).all())


def first_line(text: str, answers: Sequence[str], prompt: str) -> bool:
    """Whether the first lines of ``text`` and the answer that are not blank are equal, without outer spaces."""
    written, right = (next((line.strip() for line in t.split("\n") if line.strip()), "") for t in (text, answers[0]))
    return written == right


def python(text: str, answers: Sequence[str], prompt: str) -> bool:
    """Whether ``text`` is not empty, and is valid Python together with its prompt."""
    return bool(text) and parsed(prompt + text) is not None


# OF_LOGITS takes the logits and labels of an evaluation, OF_TEXTS the texts that greedy decoding generates.
Metrics = dict[str, Callable[[], Metric]]
OF_LOGITS: Metrics = {"accuracy": partial(Share, whole_answer), "perplexity": partial(Perplexity, ignore_index=IGNORED)}
OF_TEXTS: Metrics = {
    "bleu": SacreBLEUScore,
    "exact_match": partial(Share, first_line),
    "parses": partial(Share, python),
}


def chosen(names: Sequence[str], table: Metrics, prefix: str) -> MetricCollection:
    """The metrics of ``table`` with these names; they are logged as ``prefix`` + name."""
    made: Any = {name: table[name]() for name in names if name in table}
    # Metrics are not grouped, because two shares may be equal by chance.
    return MetricCollection(made, prefix=prefix, compute_groups=False)
