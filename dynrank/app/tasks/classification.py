"""Classification of texts: a pre-trained encoder or decoder with LoRA and a new linear head."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

import datasets
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import Accuracy, ConfusionMatrix, F1Score, Precision, Recall

from dynrank.adapters.read import read_adapter
from dynrank.adapters.sidecar_files import LABELS_FILE, stored_labels, stored_problem_type
from dynrank.app.models.names import ModelSettings
from dynrank.app.models.pretrained import load_classifier
from dynrank.app.tasks.account import ClassResult, class_results
from dynrank.app.tasks.adapter_module import AdapterModule
from dynrank.app.tasks.data.labels import counted
from dynrank.app.tasks.data.stored import say
from dynrank.app.tasks.text_task import Recipe, TextTask
from dynrank.errors import ConfigurationError, checked_call

_WHOLE = re.compile("0|-?[1-9][0-9]*")


class Classification(TextTask):
    """Texts and their classes as a task.

    A batch has int64 input_ids and attention_mask (batch, length), padded to its longest text, and labels (batch,). If
    each text has a list of labels, the labels are float32 ones and zeros (batch, classes).

    Args:
        model: name of a pre-trained model, see :func:`dynrank.app.models.names.model_source`.
        data: rows with a text, and a label or a list of labels; see
            :func:`dynrank.app.tasks.data.splits.rows_by_split`. Labels are texts or ints.
        batch_size: training texts per batch of each process; evaluation takes four times as many.
        max_length: longer texts are cut to this many tokens.
        label_smoothing: share of the target that is spread over all classes in training.
        class_weights: ``balanced``: in the training loss all classes weigh alike, whatever their numbers of texts; with
            lists of labels, having a label and not having it weigh alike. The loss is a mean over texts, so this does
            not depend on the batches. None: all texts weigh alike.
        seed: seed of the order of the training batches.
        limit: keep only this many texts of each split, for short tests; None keeps all.
        settings: how the model is loaded: fields of :class:`dynrank.app.models.names.ModelSettings`.
    """

    evaluation_factor = 4
    metrics = final = ("train/loss", "val/loss", "val/accuracy", "val/macro_f1")

    @checked_call
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
        sizes: Any = {"batch_size": batch_size, "max_length": max_length, "limit": limit}
        super().__init__(model, data, "classification", **sizes, seed=seed, settings=settings)
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights
        self.labels_before: list[str] = []
        self.kind_before: str | None = None
        self.nameless: Path | None = None

    def go_on_from(self, adapter: Path) -> None:
        """As for every text; and keep the adapter's classes, in their order, also those that no text has any more.

        Of a head whose classes nobody names, as in adapters of other programs, labels must be the numbers.
        """
        super().go_on_from(adapter)
        self.labels_before = stored_labels(adapter)
        self.kind_before = stored_problem_type(adapter)
        self.nameless = adapter if read_adapter(adapter).others and not self.labels_before else None

    def module(self, lora: Mapping[str, Any], optimizer: Mapping[str, Any], *, on_meta: bool = False) -> Classifier:
        rest: Any = {"settings": asdict(self.settings), "several": self.several, "on_meta": on_meta}
        rest["class_weights"] = self.weights
        rest["tokenizer"] = self.own_tokenizer
        return Classifier(self.model, self.labels, lora, optimizer, self.label_smoothing, **rest)

    @property
    def weights(self) -> list[float] | None:
        """The weight of each class in the training loss; None: all texts weigh alike."""
        if self.class_weights is None:
            return None
        rows = len(self.rows["train"])
        counts = counted(self.rows["train"])
        # Classes of an adapter from which training goes on may have no text, and then no weight is used.
        found = [counts.get(label, rows) for label in self.labels]
        if self.several:
            # Of a label that every text has, no text without it could weigh alike.
            return [(rows - count) / count or 1.0 for count in found]
        return [rows / (len(counts) * count) for count in found]

    @property
    def several(self) -> bool:
        """Whether a text has a list of labels."""
        return isinstance(self.rows["train"][0]["label"], list)

    @cached_property
    def labels(self) -> list[str]:
        """The names of the classes: the training texts' labels, sorted, whole numbers by value.

        Training that goes on from an adapter has the classes of its head.
        """
        if len({str(rows.features["label"]) for rows in self.rows.values()}) > 1:
            raise ConfigurationError("some splits have one label in each row, and others lists of labels; set data")
        labels, *others = ({*counted(rows)} for rows in self.rows.values())
        if self.labels_before:
            return self._labels_as_before(labels, labels.union(*others))
        unknown = sorted(set().union(*others) - labels)
        if len(labels) < 2 or unknown:
            only = f"; not among them, but in other splits: {unknown[:9]}" if unknown else ""
            few = f"training texts must have two or more labels, got {sorted(labels)[:9]}"
            raise ConfigurationError(f"{few}{only}; set data")
        found = sorted(labels, key=lambda label: (int(label), "") if _WHOLE.fullmatch(label) else (inf, label))
        if self.nameless is not None and found != [*map(str, range(len(found)))]:
            content = {"labels": found[:9], "problem_type": problem_type(several=self.several)}
            example = json.dumps(content, ensure_ascii=False)
            raise ConfigurationError(
                f"the adapter {str(self.nameless)!r} (lora.from) has no names of its classes, so the places of the "
                f"texts' labels in its head are unknown; write {LABELS_FILE} into its folder, such as {example}, with "
                "the labels in the order of its training"
            )
        return found

    def _labels_as_before(self, trained: set[str], every: set[str]) -> list[str]:
        before = self.labels_before
        kind = problem_type(several=self.several)
        if self.kind_before not in (None, kind):
            raise ConfigurationError(
                f"the adapter lora.from was trained for {self.kind_before}, and the texts have "
                f"{'lists of labels' if self.several else 'one label each'} ({kind}); set data to rows of that kind, "
                "or train without lora.from"
            )
        new = sorted(every - {*before})
        if new:
            raise ConfigurationError(
                f"the adapter lora.from has no class for the labels {new[:9]}; its classes are {before[:9]}; train "
                "without lora.from, or set data"
            )
        absent = [label for label in before if label not in trained]
        if absent:
            named = ", ".join(map(repr, absent[:9])) + f" and {len(absent) - 9:,} more" * (len(absent) > 9)
            say({"no rows of": f"{named}: classes of the adapter, which keep their places in the head"})
        return before

    @property
    def recipe(self) -> Recipe:
        label = datasets.Sequence(datasets.Value("bool")) if self.several else datasets.Value("int32")
        ids = datasets.Sequence(datasets.Value("int32"))
        features = {"input_ids": ids, "label": label, "length": datasets.Value("int32"), "cut": datasets.Value("int32")}
        return Recipe(_make_examples, datasets.Features(features), {"labels": self.labels})

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
    lengths = [len(ids) for ids in made["input_ids"]]
    # Of the examples of full length, some were cut.
    cut = [
        length == max_length and len(tokenizer(text, verbose=False).input_ids) > max_length
        for text, length in zip(texts, lengths, strict=True)
    ]
    index = {label: i for i, label in enumerate(labels)}
    values = [[one in given for one in labels] if isinstance(given, list) else index[given] for given in rows["label"]]
    return {**made, "label": values, "length": lengths, "cut": cut}


def problem_type(*, several: bool) -> str:
    """Transformers' name of the kind of labels, by which programs make probabilities: by sigmoids or by softmax."""
    return "multi_label_classification" if several else "single_label_classification"


class Classifier(AdapterModule):
    """Sequence classification with LoRA on the body, and a new head.

    All arguments are plain values that checkpoints store, so ``load_from_checkpoint`` needs no other arguments. They
    are those of :class:`Classification` and :class:`AdapterModule`; ``labels``, the names of the classes; and
    ``tokenizer``, the folder or name of the tokenizer (None: the model's). With ``several``, a text may have several
    labels, so each class is a separate yes or no. After a test, ``class_results`` has the result of each class.
    """

    class_weights: Tensor | None

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
        tokenizer: str | None = None,
        on_meta: bool = False,
    ) -> None:
        labels = list(labels)
        lora = dict(lora)
        optimizer = dict(optimizer)
        kind: Any = {"task": "multiclass", "num_classes": len(labels)}
        if several:
            kind = {"task": "multilabel", "num_labels": len(labels)}
        shares: Any = {"accuracy": Accuracy(**kind, average="micro"), "macro_f1": F1Score(**kind, average="macro")}
        splits = ("val", "test", "final/val")
        quality = {split: MetricCollection(shares).clone(prefix=f"{split}/") for split in splits}
        options: Any = {"settings": ModelSettings(**settings or {}), "tokenizer": tokenizer, "on_meta": on_meta}
        classifier: Any = load_classifier(model, len(labels), **options)
        classifier.config.id2label = dict(enumerate(labels))
        # The base's own may be another.
        classifier.config.problem_type = problem_type(several=several)
        super().__init__(classifier, lora, optimizer, quality)
        names = ("model", "labels", "lora", "optimizer", "label_smoothing", "settings", "several", "class_weights")
        self.save_hyperparameters(*names, "tokenizer")
        self.labels = labels
        self.label_smoothing = label_smoothing
        self.several = several
        weights = torch.tensor(class_weights) if class_weights is not None else None
        # A checkpoint has these among its hyperparameters.
        self.register_buffer("class_weights", weights, persistent=False)
        of_each: Any = {
            "precision": Precision(**kind, average=None),
            "recall": Recall(**kind, average=None),
            "f1": F1Score(**kind, average=None),
            "confusion": ConfusionMatrix(**kind),
        }
        self.by_class = MetricCollection(of_each)
        self.class_results: dict[str, ClassResult] = {}

    def predict(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits: Tensor = self.model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        return logits.float(), batch["labels"]

    def loss(
        self, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, weights: Tensor | None = None
    ) -> Tensor:
        """The mean over texts; ``weights`` are of the classes that texts have, whatever smoothing adds."""
        if not self.several:
            if weights is None:
                return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
            # With its argument weight, torch would weigh the mass that smoothing adds by the classes that receive it,
            # and divide by the weights in the batch, which undoes them in small batches.
            losses = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
            return (weights[labels] * losses).mean()
        wanted = labels * (1 - label_smoothing) + label_smoothing / 2
        # So pos_weight would weigh what smoothing adds to texts without the label.
        of_cells = None if weights is None else torch.where(labels.bool(), weights, 1.0)
        return F.binary_cross_entropy_with_logits(logits, wanted, weight=of_cells)

    def training_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.loss(logits, labels, self.label_smoothing, self.class_weights)

    def measure(self, split: str, logits: Tensor, labels: Tensor) -> None:
        found = (logits.sigmoid(), labels.int()) if self.several else (logits, labels)
        super().measure(split, *found)
        if split == "test":
            self.by_class.update(*found)

    def on_test_epoch_start(self) -> None:
        self.by_class.reset()

    def on_test_epoch_end(self) -> None:
        found = {name: value.tolist() for name, value in self.by_class.compute().items()}
        self.class_results = class_results(found, self.labels)
