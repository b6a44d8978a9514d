"""Which block of ICD-10-CM does a clinical term belong to? A pre-trained encoder, LoRA and a fresh linear head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from dynrank.distributed.sharding import shard_frozen
from dynrank.errors import ConfigurationError
from dynrank.layers.finding import adapter_parameters
from dynrank.layers.placing import add_lora
from dynrank.models.pretrained import head_names, load_classifier, load_tokenizer
from dynrank.tasks.data.icd10 import Terms, TermSplits, icd10_terms
from dynrank.tasks.loader import ResumableLoader, evaluation_batches, spread, weight
from dynrank.tasks.optimizers import make_optimizer

_Example = tuple[list[int], int]  # token ids, label


class MedicalTermsData(LightningDataModule):
    """Tokenised ICD-10-CM terms, shared out among the trainer's processes (``use_distributed_sampler=False``).

    A batch has int64 input_ids and attention_mask (batch, length), and labels (batch,).

    Args:
        model: short name, folder or hub name of the model, for its tokenizer.
        batch_size: training examples per batch of each process; evaluation takes four times as many.
        max_length: tokens after which a term is cut.
        chapters: see :func:`dynrank.tasks.data.icd10.icd10_terms`, as are ``code_length`` and ``min_terms``.
        code_length: see there.
        min_terms: see there.
        seed: of the splits and of the order of the batches.
        limit: keep only the first terms of each split (for trying things out); None keeps all.
    """

    def __init__(
        self,
        model: str,
        *,
        batch_size: int,
        max_length: int,
        chapters: Sequence[int] | None,
        code_length: int,
        min_terms: int,
        seed: int,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise ConfigurationError(f"task.limit must be null or an int of at least 1, got {limit!r}")
        if batch_size < 1 or max_length < 3:
            raise ConfigurationError(
                f"task.batch_size must be at least 1 and task.max_length at least 3, got {batch_size} and {max_length}"
            )
        self.model, self.batch_size, self.max_length, self.seed, self.limit = model, batch_size, max_length, seed, limit
        self.splits: TermSplits = icd10_terms(chapters, code_length, min_terms, seed)
        self.tokenizer: Any = None

    @property
    def labels(self) -> tuple[str, ...]:
        return self.splits.blocks

    def setup(self, stage: str) -> None:
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.model)

    def train_dataloader(self) -> ResumableLoader:
        examples = self._examples(self.splits.train)
        if len(examples) < self.batch_size * self.share[1]:
            raise ConfigurationError(
                f"task.batch_size must be at most the {len(examples)} training terms, got {self.batch_size} in each of "
                f"{self.share[1]} processes"
            )
        lengths = [len(ids) for ids, _ in examples]
        options: Any = {"collate_fn": self._collate, "share": self.share}
        return ResumableLoader(examples, lengths, self.batch_size, self.seed, **options)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return self._evaluation(self._examples(self.splits.val))

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Of the test terms, the validation terms, and as many training terms, always the same ones."""
        test, val, train = (self._examples(part) for part in (self.splits.test, self.splits.val, self.splits.train))
        return [self._evaluation(part) for part in (test, val, spread(train, len(val)))]

    @property
    def share(self) -> tuple[int, int]:
        """(number of this process, how many the trainer has)."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _evaluation(self, examples: Sequence[_Example]) -> DataLoader[Any]:
        ordered: Any = sorted(examples, key=lambda example: len(example[0]))  # equal lengths: no padding
        batches = evaluation_batches(len(ordered), self.batch_size * 4, self.share)
        return DataLoader(ordered, batch_sampler=batches, collate_fn=self._collate)

    def _examples(self, terms: Terms) -> list[_Example]:
        texts, labels = list(terms.texts), terms.labels
        if self.limit is not None:  # texts are sorted; take them from everywhere
            step = max(1, len(texts) // self.limit)
            texts, labels = texts[::step][: self.limit], labels[::step][: self.limit]
        ids = self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        return list(zip(ids, labels, strict=True))

    def _collate(self, examples: Sequence[_Example]) -> dict[str, Tensor]:
        batch = self.tokenizer.pad({"input_ids": [ids for ids, _ in examples]}, return_tensors="pt")
        return {**batch, "labels": torch.tensor([label for _, label in examples])}


class TermClassifier(LightningModule):
    """Sequence classification with LoRA on the encoder; ``self.model`` is the transformers model that is exported.

    A test also evaluates the validation terms and a sample of the training terms, as in a validation but at the final
    weights, and logs what it finds as ``final/val/…`` and ``final/train/loss``.

    All arguments are plain values and are saved in checkpoints, so ``load_from_checkpoint`` needs nothing else.

    Args:
        model: short name, folder or hub name.
        labels: class names.
        lora: keyword arguments of :func:`dynrank.add_lora`.
        optimizer: keyword arguments of :func:`dynrank.tasks.optimizers.make_optimizer`.
        label_smoothing: share of the target spread over all classes in training, in [0, 1).
        on_meta: build the model without weights (to look at its layers).
    """

    def __init__(
        self,
        model: str,
        labels: Sequence[str],
        lora: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        label_smoothing: float = 0.0,
        on_meta: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(label_smoothing, int | float) or not 0 <= label_smoothing < 1:
            raise ConfigurationError(f"task.label_smoothing must be in [0, 1), got {label_smoothing!r}")
        labels, lora, optimizer = list(labels), dict(lora), dict(optimizer)
        self.save_hyperparameters("model", "labels", "lora", "optimizer", "label_smoothing")
        self.label_smoothing = label_smoothing
        self.optimizer_options = optimizer
        self.model = load_classifier(model, len(labels), on_meta=on_meta)
        add_lora(self.model.train(), modules_to_save=head_names(self.model), **lora)
        quality = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(len(labels), average="micro"),
                "macro_f1": MulticlassF1Score(len(labels), average="macro"),
            }
        )
        self.val_quality, self.test_quality = quality.clone(prefix="val/"), quality.clone(prefix="test/")
        self.final_quality = quality.clone(prefix="final/val/")

    def configure_model(self) -> None:
        if self.device_mesh is not None:  # under ModelParallelStrategy; load_from_checkpoint calls this, too
            shard_frozen(self.model, self.device_mesh["data_parallel"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self._logits(batch), batch["labels"], label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val/loss", self.val_quality)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        name = ("test/loss", "final/val/loss", "final/train/loss")[dataloader_idx]
        self._evaluate(batch, name, (self.test_quality, self.final_quality, None)[dataloader_idx])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        adapter = adapter_parameters(self.model)
        head = [p for name in head_names(self.model) for p in self.model.get_submodule(name).parameters()]
        total_steps = int(self.trainer.estimated_stepping_batches)
        return make_optimizer(adapter, head, total_steps, **self.optimizer_options)

    def _evaluate(self, batch: dict[str, Tensor], name: str, quality: MetricCollection | None) -> None:
        logits = self._logits(batch)
        loss = F.cross_entropy(logits, batch["labels"])
        options: Any = {"batch_size": weight(len(logits)), "add_dataloader_idx": False}
        self.log(name, loss, prog_bar=not name.startswith("final/"), sync_dist=True, **options)
        if quality is not None:
            quality.update(logits, batch["labels"])
            self.log_dict(quality, **options)

    def _logits(self, batch: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        return logits.float()


class MedicalTerms:
    """The task as the command line composes it: its data, and a module for given LoRA and optimizer settings.

    Args:
        model: short name, folder or hub name of the model.
        label_smoothing: see :class:`TermClassifier`.
        **data: the other arguments of :class:`MedicalTermsData`.

    Attributes:
        metrics: names of what is logged in training and validation.
        final: those of them that a test measures at the final weights, too.
    """

    metrics = final = ("train/loss", "val/loss", "val/accuracy", "val/macro_f1")

    def __init__(self, model: str, label_smoothing: float, **data: Any) -> None:
        self.model, self.label_smoothing = model, label_smoothing
        self.data = MedicalTermsData(model, **data)

    def module(self, lora: Mapping[str, Any], optimizer: Mapping[str, Any], *, on_meta: bool = False) -> TermClassifier:
        return TermClassifier(self.model, self.data.labels, lora, optimizer, self.label_smoothing, on_meta)
