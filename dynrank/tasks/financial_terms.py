"""A line item of a financial report in, the section of the statement where it stands out, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torchmetrics import MeanMetric

from dynrank.tasks.data.us_gaap import LineItem, line_items
from dynrank.tasks.prompted import FINAL, IGNORED, PromptedData, PromptedModel, check_counts


class LineItemsData(PromptedData):
    """Line items as prompts, their sections as answers; see :class:`PromptedData` for batches and arguments."""

    noun = "line items"

    def __init__(
        self,
        model: str,
        *,
        batch_size: int,
        max_length: int,
        seed: int,
        val_items: int | None,
        limit: int | None = None,
    ) -> None:
        check_counts({"batch_size": batch_size, "max_length": max_length}, {"val_items": val_items, "limit": limit})
        super().__init__(
            model, batch_size=batch_size, max_length=max_length, seed=seed, val_count=val_items, limit=limit
        )
        self.splits = line_items(seed)

    def texts(self) -> Mapping[str, Sequence[tuple[str, str, LineItem]]]:
        return {
            split: [(f"Line item: {item.text}\nSection:", f" {item.section}", item) for item in items]
            for split, items in vars(self.splits).items()
        }


class SectionWriter(PromptedModel):
    """A causal language model with LoRA that writes the section; ``self.model`` is what is exported.

    Logged are the mean cross-entropy of the tokens of sections, and the accuracy: the share of items of which greedy
    decoding gives the section and its end, and nothing else. One forward tells: if each token of the section is the
    most probable one behind the true ones before it, greedy decoding writes just these.

    All arguments are plain values and are saved in checkpoints, so ``load_from_checkpoint`` needs nothing else.

    Args:
        model: short name, folder, GGUF file or hub name.
        lora: keyword arguments of :func:`dynrank.add_lora`.
        optimizer: keyword arguments of :func:`dynrank.tasks.optimizers.make_optimizer`.
        on_meta: build the model without weights (to look at its layers).
    """

    def __init__(
        self, model: str, lora: Mapping[str, Any], optimizer: Mapping[str, Any], on_meta: bool = False
    ) -> None:
        lora, optimizer = dict(lora), dict(optimizer)
        super().__init__(model, lora, optimizer, on_meta)
        self.save_hyperparameters("model", "lora", "optimizer")
        self.val_accuracy, self.test_accuracy = MeanMetric(), MeanMetric()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        if dataloader_idx:
            self.evaluate(batch, FINAL[dataloader_idx - 1])
        else:
            self._evaluate(batch, "test", self.test_accuracy)

    def _evaluate(self, batch: dict[str, Tensor], split: str, accuracy: MeanMetric) -> None:
        logits, labels = self.evaluate(batch, split)
        right = (logits.argmax(-1) == labels) | (labels == IGNORED)
        accuracy.update(right.all(1).float())
        self.log(f"{split}/accuracy", accuracy, batch_size=len(labels), prog_bar=True, add_dataloader_idx=False)


class FinancialTerms:
    """The task as the command line composes it: its data, and a module for given LoRA and optimizer settings.

    Args:
        model: short name, folder, GGUF file or hub name of the model.
        **data: the other arguments of :class:`LineItemsData`.

    Attributes:
        metrics: names of what is logged in training and validation.
        final: those of them that a test measures at the final weights, too.
    """

    metrics = ("train/loss", "val/loss", "val/accuracy")
    final = ("train/loss", "val/loss")

    def __init__(self, model: str, **data: Any) -> None:
        self.model, self.data = model, LineItemsData(model, **data)

    def module(self, lora: Mapping[str, Any], optimizer: Mapping[str, Any], *, on_meta: bool = False) -> SectionWriter:
        return SectionWriter(self.model, lora, optimizer, on_meta)
