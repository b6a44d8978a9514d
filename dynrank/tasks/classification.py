"""Which class does a text belong to? A pre-trained encoder or decoder, LoRA and a fresh linear head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from dynrank.errors import ConfigurationError, validated_call
from dynrank.models.pretrained import load_classifier
from dynrank.models.settings import ModelSettings
from dynrank.tasks.adapter_module import AdapterModule
from dynrank.tasks.data.splits import pairs_by_split
from dynrank.tasks.text_task import TextTask

__all__ = ["Classification", "Classifier"]


@dataclass(frozen=True)
class Labelled:
    """Token ids of a text, and the index of its class."""

    ids: list[int]
    label: int

    def __len__(self) -> int:
        return len(self.ids)


class Classification(TextTask):
    """Texts and their classes as a task (see :class:`dynrank.tasks.task.Task`).

    A batch has int64 input_ids and attention_mask (batch, length), padded to its longest text, and labels (batch,).

    Args:
        model: name of a pre-trained model, see :func:`dynrank.models.names.model_source`.
        data: ``train``, ``val`` and ``test``, each a ``datasets.Dataset`` with the columns text and label, or a list
            of (text, label); or a function that returns these. Labels are texts or ints.
        batch_size: training texts per batch of each process; evaluation takes four times as many.
        max_length: tokens after which a text is cut.
        label_smoothing: share of the target that is spread over all classes in training.
        seed: of the order of the training batches.
        limit: keep only this many texts of each split, for trying things out; None keeps all.
        settings: how the model is loaded: fields of :class:`dynrank.models.settings.ModelSettings`.
    """

    metrics = final = ("train/loss", "val/loss", "val/accuracy", "val/macro_f1")

    @validated_call("task")
    def __init__(
        self,
        model: str,
        data: Any,
        *,
        batch_size: Annotated[int, Field(ge=1)] = 32,
        max_length: Annotated[int, Field(ge=3)] = 128,
        label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        seed: int = 0,
        limit: Annotated[int, Field(ge=1)] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        sizes = {"batch_size": batch_size, "evaluation_size": 4 * batch_size}
        super().__init__(model, **sizes, seed=seed, settings=settings)
        self.data, self.max_length, self.label_smoothing, self.limit = data, max_length, label_smoothing, limit

    def module(self, lora: Mapping[str, Any], optimizer: Mapping[str, Any], *, on_meta: bool = False) -> Classifier:
        labels = [str(label) for label in self.labels]
        return Classifier(self.model, labels, lora, optimizer, self.label_smoothing, asdict(self.settings), on_meta)

    @cached_property
    def pairs(self) -> dict[str, list[tuple[str, Any]]]:
        """(text, label) by split."""
        return pairs_by_split(self.data, ("text", "label"), str | int)

    @cached_property
    def labels(self) -> list[Any]:
        """The labels of the training texts, sorted: those of the classes."""
        labels = {label for _, label in self.pairs["train"]}
        unknown = {label for rows in self.pairs.values() for _, label in rows} - labels
        if len({type(label) for label in labels}) > 1 or len(labels) < 2 or unknown:
            raise ConfigurationError(
                f"labels of the training texts must be two or more texts, or two or more ints, got {[*labels][:9]}; "
                f"not among them, but in other splits: {[*unknown][:9]}; set data"
            )
        return sorted(labels)

    def load(self) -> Mapping[str, Sequence[Labelled]]:
        index = {label: i for i, label in enumerate(self.labels)}
        examples = {}
        for split, rows in self.pairs.items():
            if self.limit is not None:  # from everywhere: the rows may be sorted
                rows = rows[:: max(1, len(rows) // self.limit)][: self.limit]
            ids = self.tokenizer([text for text, _ in rows], truncation=True, max_length=self.max_length)["input_ids"]
            examples[split] = [Labelled(i, index[label]) for i, (_, label) in zip(ids, rows, strict=True)]
        return examples

    def collate(self, examples: Sequence[Labelled]) -> dict[str, Tensor]:
        padded = self.tokenizer.pad({"input_ids": [example.ids for example in examples]}, return_tensors="pt")
        return {**padded, "labels": torch.tensor([example.label for example in examples])}


class Classifier(AdapterModule):
    """Sequence classification with LoRA on the body, and a fresh head.

    All arguments are plain values and are saved in checkpoints, so ``load_from_checkpoint`` needs nothing else.

    Args:
        model: name of the pre-trained model.
        labels: names of the classes.
        lora: see :class:`AdapterModule`, as are ``optimizer`` and ``label_smoothing``.
        optimizer: of the adapter and the head.
        label_smoothing: in training.
        settings: how the model is loaded, see :class:`Classification`.
        on_meta: build the model without weights, to look at its layers.
    """

    def __init__(
        self,
        model: str,
        labels: Sequence[str],
        lora: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        label_smoothing: float = 0.0,
        settings: Mapping[str, Any] | None = None,
        on_meta: bool = False,
    ) -> None:
        labels, lora, optimizer, count = list(labels), dict(lora), dict(optimizer), len(labels)
        accuracy, f1 = MulticlassAccuracy(count, average="micro"), MulticlassF1Score(count, average="macro")
        quality = {
            split: MetricCollection({"accuracy": accuracy, "macro_f1": f1}).clone(prefix=f"{split}/")
            for split in ("val", "test", "final/val")
        }
        classifier: Any = load_classifier(model, count, settings=ModelSettings(**settings or {}), on_meta=on_meta)
        classifier.config.id2label = dict(enumerate(labels))
        super().__init__(classifier, lora, optimizer, quality, label_smoothing)
        self.save_hyperparameters("model", "labels", "lora", "optimizer", "label_smoothing", "settings")

    def predict(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits: Tensor = self.model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        return logits.float(), batch["labels"]
