"""Batches of tokenised texts, as the tasks that ship give them to the trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from dynrank.errors import ConfigurationError
from dynrank.models.pretrained import load_tokenizer
from dynrank.models.settings import ModelSettings
from dynrank.tasks.loader import ResumableLoader, evaluation_batches, spread

__all__ = ["TextTask"]


class TextTask(LightningDataModule):
    """Batches of tokenised examples, shared out among the trainer's processes (``use_distributed_sampler=False``).

    Training draws them as :class:`dynrank.tasks.loader.ResumableLoader` does. A validation and a test take each example
    once, by length; a test takes the test examples, those of a validation, and as many training examples. Subclasses
    have :meth:`load` and :meth:`collate`.

    Args:
        model: name of the model whose tokenizer makes the examples.
        batch_size: training examples per batch of each process.
        evaluation_size: examples per batch of a validation or test, at most.
        val_examples: that a validation takes; None for all.
        seed: of the order of the training batches.
        settings: how the model is loaded, see :class:`dynrank.models.settings.ModelSettings`.
    """

    def __init__(
        self,
        model: str,
        *,
        batch_size: int,
        evaluation_size: int,
        seed: int,
        val_examples: int | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.settings = ModelSettings(**settings or {})
        self.model, self.batch_size, self.evaluation_size = model, batch_size, evaluation_size
        self.seed, self.val_examples = seed, val_examples
        self.examples: Mapping[str, Sequence[Any]] = {}

    def load(self) -> Mapping[str, Sequence[Any]]:
        """The examples of train, val and test; the length of an example is its number of tokens."""
        raise NotImplementedError

    def collate(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """A batch of these examples."""
        raise NotImplementedError

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.model, settings=self.settings)

    @property
    def share(self) -> tuple[int, int]:
        """(number of this process, how many the trainer has)."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def setup(self, stage: str) -> None:
        self.examples = self.examples or self.load()

    def train_dataloader(self) -> ResumableLoader:
        examples: Any = self.examples["train"]
        if len(examples) < self.batch_size * self.share[1]:
            raise ConfigurationError(
                f"task.batch_size must be at most the {len(examples)} training examples, got {self.batch_size} in each "
                f"of {self.share[1]} processes"
            )
        lengths = [len(example) for example in examples]
        return ResumableLoader(examples, lengths, self.batch_size, self.seed, self.collate, share=self.share)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [self.evaluation(spread(self.examples["val"], self.val_examples))]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        val = spread(self.examples["val"], self.val_examples)
        parts = self.examples["test"], val, spread(self.examples["train"], len(val))
        return [self.evaluation(part) for part in parts]

    def evaluation(self, examples: Sequence[Any], collate: Any = None) -> DataLoader[Any]:
        """Each of the examples once, by length; ``collate`` makes other batches of them than training has."""
        ordered: Any = sorted(examples, key=len)  # equal lengths need no padding
        batches = evaluation_batches(len(ordered), self.evaluation_size, self.share)
        return DataLoader(ordered, batch_sampler=batches, collate_fn=collate or self.collate)
