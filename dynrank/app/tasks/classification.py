"""Classification of texts: a pre-trained encoder or decoder with LoRA and a new linear head."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any
from unicodedata import normalize

import torch
from lightning.pytorch.utilities import rank_zero_only
from pydantic import Field
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import Accuracy, F1Score

from dynrank.adapters.read import read_adapter
from dynrank.adapters.sidecar_files import LABELS_FILE, stored_labels
from dynrank.app.models.pretrained import load_classifier
from dynrank.app.tasks.adapter_module import AdapterModule
from dynrank.app.tasks.text_task import TextTask
from dynrank.errors import ConfigurationError, Count, checked_call


class Classification(TextTask):
    """Texts and their classes as a task.

    A batch has int64 input_ids and attention_mask (batch, length), padded to its longest text, and labels (batch,).

    Other arguments are those of :class:`dynrank.app.tasks.text_task.TextTask`.

    Args:
        data: rows with a text, and a label, a text or an int.
        max_length: longer texts are cut to this many tokens.
        label_smoothing: share of the target that is spread over all classes in training.
    """

    evaluation_factor = 4
    metrics = final = ("train/loss", "val/loss", "val/accuracy", "val/macro_f1")

    @checked_call
    def __init__(
        self,
        model: str,
        data: Any,
        *,
        batch_size: Count = 32,
        max_length: Annotated[int, Field(ge=3)] = 128,
        label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        seed: int = 0,
        limit: Count | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        sizes: Any = {"batch_size": batch_size, "max_length": max_length, "limit": limit}
        super().__init__(model, data, "classification", **sizes, seed=seed, settings=settings)
        self.label_smoothing = label_smoothing
        self.labels_before: list[str] = []

    def go_on_from(self, adapter: Path) -> None:
        """As for every text; and keep the adapter's classes, in their order, also those that no text has any more."""
        super().go_on_from(adapter)
        self.labels_before = stored_labels(adapter)
        # Another program's adapter with a head.
        if read_adapter(adapter).others and not self.labels_before:
            raise ConfigurationError(
                f"the adapter {str(adapter)!r} (lora.from) has no names of its classes; write {LABELS_FILE} into its "
                'folder, {"labels": [...]}, with the labels in the order of its training'
            )

    def module(self, lora: Mapping[str, Any], optimizer: Mapping[str, Any], *, on_meta: bool = False) -> Classifier:
        options: Any = {"settings": self.settings, "tokenizer": self.own_tokenizer, "on_meta": on_meta}
        model = load_classifier(self.model, len(self.labels), **options)
        return Classifier(model, self.labels, lora, optimizer, self.label_smoothing)

    @cached_property
    def labels(self) -> list[str]:
        """The names of the classes: the training texts' labels, numbers first and by value, so that 10 is behind 2.

        Training that goes on from an adapter has the classes of its head.
        """
        trained, *others = ({*rows["label"]} for rows in self.rows.values())
        rank_zero_only(_say_alike)(sorted(trained.union(*others)))
        before = self.labels_before
        known = {*before} or trained
        unknown = sorted(trained.union(*others) - known)
        if len(known) < 2 or unknown:
            whose = "the adapter lora.from" if before else "the training texts"
            raise ConfigurationError(
                f"texts must have two or more labels, those of {whose}, {sorted(known)[:9]}, got {unknown[:9]} beside "
                "them; set data"
            )
        return before or sorted(known, key=_in_order)

    @property
    def recipe(self) -> tuple[Callable[..., Any], dict[str, Any]]:
        return make_examples, {"max_length": self.max_length, "classes": self.labels}

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        padded = self.tokenizer.pad({"input_ids": [e["input_ids"] for e in examples]}, return_tensors="pt")
        return {**padded, "labels": torch.tensor([example["label"] for example in examples])}


def _say_alike(labels: Sequence[str]) -> None:
    alike = defaultdict[str, list[str]](list)
    for label in labels:
        alike["".join(normalize("NFKC", label).casefold().split())].append(label)
    for same in alike.values():
        if len(same) > 1:
            print(f"labels that differ only by case, blanks or Unicode form: {', '.join(map(repr, same))}")


def _in_order(label: str) -> tuple[bool, int, str]:
    is_number = label.isdecimal()
    return not is_number, int(label) if is_number else 0, label


def make_examples(
    rows: Mapping[str, list[Any]], *, tokenizer: Any, max_length: int, classes: Sequence[str]
) -> dict[str, list[Any]]:
    """Token ids of a batch of texts, cut to ``max_length``, and the numbers of their classes."""
    options = {"return_token_type_ids": False, "return_attention_mask": False}
    ids = tokenizer(rows["text"], truncation=True, max_length=max_length, **options)["input_ids"]
    labels = [classes.index(label) for label in rows["label"]]
    return {"input_ids": ids, "label": labels, "length": [*map(len, ids)]}


class Classifier(AdapterModule):
    """Sequence classification with LoRA on the body, and a new head.

    ``model`` is of :func:`dynrank.app.models.pretrained.load_classifier`, ``labels`` are the names of its classes.
    Other arguments are those of :class:`AdapterModule`.
    """

    def __init__(
        self,
        model: Any,
        labels: Sequence[str],
        lora: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        label_smoothing: float = 0.0,
    ) -> None:
        kind: Any = {"task": "multiclass", "num_classes": len(labels)}
        shares: Any = {"accuracy": Accuracy(**kind, average="micro"), "macro_f1": F1Score(**kind, average="macro")}
        splits = ("val", "test", "final/val")
        quality = {split: MetricCollection(shares).clone(prefix=f"{split}/") for split in splits}
        model.config.id2label = dict(enumerate(labels))
        # The base's own may be another; by it programs make probabilities of logits.
        model.config.problem_type = "single_label_classification"
        super().__init__(model, lora, optimizer, quality, label_smoothing)
        # A run that is resumed must have the same.
        self.save_hyperparameters({"labels": [*labels], "optimizer": dict(optimizer)})

    def predict(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits: Tensor = self.model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        return logits.float(), batch["labels"]
