"""Classification of texts: a pre-trained encoder or decoder with LoRA and a new linear head."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from math import inf
from typing import Annotated, Any, Literal

import datasets
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
    MultilabelAccuracy,
    MultilabelConfusionMatrix,
    MultilabelF1Score,
    MultilabelPrecision,
    MultilabelRecall,
)

from dynrank.errors import ConfigurationError, validated_call
from dynrank.models.names import ModelSettings
from dynrank.models.pretrained import load_classifier
from dynrank.tasks.adapter_module import AdapterModule
from dynrank.tasks.data.stored import counted
from dynrank.tasks.text_task import Recipe, TextTask

_WHOLE = re.compile("0|-?[1-9][0-9]*")


class Classification(TextTask):
    """Texts and their classes as a task.

    A batch has int64 input_ids and attention_mask (batch, length), padded to its longest text, and labels (batch,). If
    each text has a list of labels, the labels are float32 ones and zeros (batch, classes).

    Args:
        model: name of a pre-trained model, see :func:`dynrank.models.names.model_source`.
        data: rows with a text, and a label or a list of labels; see
            :func:`dynrank.tasks.data.splits.rows_by_split`. Labels are texts or ints.
        batch_size: training texts per batch of each process; evaluation takes four times as many.
        max_length: longer texts are cut to this many tokens.
        label_smoothing: share of the target that is spread over all classes in training.
        class_weights: ``balanced``: in the training loss all classes weigh alike, whatever their numbers of texts; with
            lists of labels, having a label and not having it weigh alike. None: all texts weigh alike.
        seed: seed of the order of the training batches.
        limit: keep only this many texts of each split, for short tests; None keeps all.
        settings: how the model is loaded: fields of :class:`dynrank.models.names.ModelSettings`.
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
        class_weights: Literal["balanced"] | None = None,
        seed: int = 0,
        limit: Annotated[int, Field(ge=1)] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        sizes = {"batch_size": batch_size, "evaluation_size": 4 * batch_size}
        super().__init__(model, data, "classification", **sizes, seed=seed, limit=limit, settings=settings)
        self.max_length = max_length
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights

    def module(self, lora: Mapping[str, Any], optimizer: Mapping[str, Any], *, on_meta: bool = False) -> Classifier:
        rest: Any = {"settings": asdict(self.settings), "several": self.several, "on_meta": on_meta}
        rest["class_weights"] = self.weights
        return Classifier(self.model, self.labels, lora, optimizer, self.label_smoothing, **rest)

    @property
    def weights(self) -> list[float] | None:
        """The weight of each class in the training loss; None: all texts weigh alike."""
        if self.class_weights is None:
            return None
        rows = len(self.rows["train"])
        counts = counted(self.rows["train"])
        if self.several:
            return [(rows - counts[label]) / counts[label] for label in self.labels]
        return [rows / (len(counts) * counts[label]) for label in self.labels]

    @property
    def several(self) -> bool:
        """Whether a text has a list of labels."""
        return isinstance(self.rows["train"][0]["label"], list)

    @cached_property
    def labels(self) -> list[str]:
        """The names of the classes: the training texts' labels, sorted, whole numbers by value."""
        labels, *others = ({*counted(rows)} for rows in self.rows.values())
        unknown = sorted(set().union(*others) - labels)
        if len(labels) < 2 or unknown:
            only = f"; not among them, but in other splits: {unknown[:9]}" if unknown else ""
            few = f"training texts must have two or more labels, got {sorted(labels)[:9]}"
            raise ConfigurationError(f"{few}{only}; set data")
        return sorted(labels, key=lambda label: (int(label), "") if _WHOLE.fullmatch(label) else (inf, label))

    def recipe(self, split: str) -> Recipe:
        label = datasets.Sequence(datasets.Value("bool")) if self.several else datasets.Value("int32")
        ids = datasets.Sequence(datasets.Value("int32"))
        features = {"input_ids": ids, "label": label, "length": datasets.Value("int32"), "cut": datasets.Value("int32")}
        options = {"max_length": self.max_length, "labels": self.labels}
        return Recipe(_make_examples, datasets.Features(features), options)

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        padded = self.tokenizer.pad({"input_ids": [e["input_ids"] for e in examples]}, return_tensors="pt")
        labels = torch.tensor([example["label"] for example in examples])
        return {**padded, "labels": labels.float() if self.several else labels}


def _make_examples(
    rows: Mapping[str, list[Any]], *, tokenizer: Any, max_length: int, labels: list[str]
) -> dict[str, list[Any]]:
    texts = rows["text"]
    options = {"return_token_type_ids": False, "return_attention_mask": False}
    made = tokenizer(texts, truncation=True, max_length=max_length, **options)
    full = [i for i, ids in enumerate(made["input_ids"]) if len(ids) == max_length]
    # Of the examples of full length, some were cut; a tokenizer in Python does not say which, so it runs again.
    if made.is_fast:
        longer = {i for i in full if made[i].overflowing}
    else:
        longer = {i for i in full if len(tokenizer(texts[i], verbose=False).input_ids) > max_length}
    index = {label: i for i, label in enumerate(labels)}
    values = [[one in given for one in labels] if isinstance(given, list) else index[given] for given in rows["label"]]
    cut = [i in longer for i in range(len(values))]
    return {**made, "label": values, "length": [len(ids) for ids in made["input_ids"]], "cut": cut}


class Classifier(AdapterModule):
    """Sequence classification with LoRA on the body, and a new head.

    All arguments are plain values that checkpoints store, so ``load_from_checkpoint`` needs no other arguments. They
    are those of :class:`Classification` and :class:`AdapterModule`, and ``labels``, the names of the classes. With
    ``several``, a text may have several labels, so each class is a separate yes or no.
    """

    def __init__(
        self,
        model: str,
        labels: Sequence[str],
        lora: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        label_smoothing: float = 0.0,
        settings: Mapping[str, Any] | None = None,
        several: bool = False,
        class_weights: Sequence[float] | None = None,
        on_meta: bool = False,
    ) -> None:
        labels, lora, optimizer, count = list(labels), dict(lora), dict(optimizer), len(labels)
        accuracy: Any = (MultilabelAccuracy if several else MulticlassAccuracy)(count, average="micro")
        f1: Any = (MultilabelF1Score if several else MulticlassF1Score)(count, average="macro")
        quality = {
            split: MetricCollection({"accuracy": accuracy, "macro_f1": f1}).clone(prefix=f"{split}/")
            for split in ("val", "test", "final/val")
        }
        classifier: Any = load_classifier(model, count, settings=ModelSettings(**settings or {}), on_meta=on_meta)
        classifier.config.id2label = dict(enumerate(labels))
        if several:
            # This problem type makes probabilities sigmoids.
            classifier.config.problem_type = "multi_label_classification"
        of_classes: Any = {"class_weights": class_weights, "by_class": _class_metrics(count, several)}
        super().__init__(classifier, lora, optimizer, quality, label_smoothing, **of_classes, labels=labels)
        names = ("model", "labels", "lora", "optimizer", "label_smoothing", "settings", "several", "class_weights")
        self.save_hyperparameters(*names)
        self.several = several

    def predict(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits: Tensor = self.model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        return logits.float(), batch["labels"]

    def loss(
        self, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, weights: Tensor | None = None
    ) -> Tensor:
        if not self.several:
            return super().loss(logits, labels, label_smoothing, weights)
        wanted = labels * (1 - label_smoothing) + label_smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, wanted, pos_weight=weights)

    def measured(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return (logits.sigmoid(), labels.int()) if self.several else (logits, labels)


def _class_metrics(count: int, several: bool) -> MetricCollection:
    """Metrics of each of ``count`` classes; with ``several``, a text may have several labels."""
    options: Any = {"average": None}
    metrics: dict[str, Any] = {
        "precision": MulticlassPrecision(count, **options),
        "recall": MulticlassRecall(count, **options),
        "f1": MulticlassF1Score(count, **options),
        "confusion": MulticlassConfusionMatrix(count),
    }
    if several:
        metrics = {
            "precision": MultilabelPrecision(count, **options),
            "recall": MultilabelRecall(count, **options),
            "f1": MultilabelF1Score(count, **options),
            "confusion": MultilabelConfusionMatrix(count),
        }
    return MetricCollection(metrics)
