"""Batches of tokenised texts, the common part of dynrank's own tasks."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader

from dynrank.adapters.sidecar_files import Inputs, tokenizer_source
from dynrank.app.console import print_facts
from dynrank.app.models.names import ModelSettings
from dynrank.app.models.pretrained import load_tokenizer, positions
from dynrank.app.tasks.data.columns import Form
from dynrank.app.tasks.data.rows import fingerprint
from dynrank.app.tasks.data.splits import Checked, rows_by_split
from dynrank.app.tasks.loader import ResumableLoader, evaluation_batches, spread
from dynrank.errors import ConfigurationError


class TextTask(LightningDataModule):
    """Batches of tokenised examples, divided among the trainer's processes (``use_distributed_sampler=False``).

    Training draws them by :class:`dynrank.app.tasks.loader.ResumableLoader`. A validation and a test use each example
    once, sorted by length; a test uses the test examples, the validation examples, and as many training examples.
    Subclasses define :attr:`recipe` and :meth:`collate`. Data and examples from files are memory-mapped.

    Args:
        model: name of a pre-trained model, see :func:`dynrank.app.models.names.model_source`.
        data: rows in the columns of ``form``, see :func:`dynrank.app.tasks.data.splits.rows_by_split`.
        form: form of the rows.
        batch_size: training examples per batch of each process.
        max_length: the most tokens of an example.
        seed: seed of the order of the training batches.
        limit: keep only this many rows of each split, for short tests; None keeps all.
        val_examples: number of validation examples; None for all. The test uses all its examples.
        settings: how the model is loaded: fields of :class:`dynrank.app.models.names.ModelSettings`.

    Attributes:
        evaluation_factor: how many times as many examples a batch of a validation or test has at most as in training.
        features: features of the examples, of which ``length`` is the number of tokens; None: those of the first.
        examples: {split: its examples}, once they are made.
        account: {split: its counts of rows, of rows that were left out, and of examples and tokens made of the others}.
    """

    evaluation_factor: int
    features: datasets.Features | None = None

    def __init__(
        self,
        model: str,
        data: Any,
        form: Form,
        *,
        batch_size: int,
        max_length: int,
        seed: int,
        limit: int | None,
        val_examples: int | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.settings = ModelSettings(**settings or {})
        self.model = model
        # Where the tokenizer of the adapter is from which training goes on; None: it is the base's.
        self.own_tokenizer: str | None = None
        self.data = data
        self.form = form
        self.batch_size = batch_size
        self.max_length = max_length
        self.seed = seed
        self.val_examples = val_examples
        self.limit = limit
        self.examples: Mapping[str, datasets.Dataset] = {}
        self.account: dict[str, dict[str, int]] = {}

    @property
    def recipe(self) -> tuple[Callable[..., dict[str, list[Any]]], dict[str, Any]]:
        """The function that makes the columns of :attr:`features` of a batch of rows, and its options.

        The examples are read from the cache on disk if it made them before, with these options and this tokenizer.
        """
        raise NotImplementedError

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch with these examples."""
        raise NotImplementedError

    @cached_property
    def rows(self) -> Checked:
        """The data by split, checked."""
        return rows_by_split(self.data, self.form)

    @property
    def training_inputs(self) -> Inputs:
        """How inputs are made of rows, for the adapter's folder."""
        rows = self.rows
        columns = {ours: theirs if isinstance(theirs, str) else [*theirs] for ours, theirs in rows.columns.items()}
        begins = {tuple(turns[0].values()) for turns in rows["train"]["messages"]} if self.form == "chat" else {}
        return Inputs(self.form, columns, dict(begins).get("system") if len(begins) == 1 else None, self.max_length)

    def go_on_from(self, adapter: Path) -> None:
        """Read data as the adapter in this folder was trained: with its own tokenizer, if it has one."""
        place = tokenizer_source(adapter, self.model)
        self.own_tokenizer = None if place == self.model else place

    @cached_property
    def tokenizer(self) -> Any:
        tokenizer = load_tokenizer(self.own_tokenizer or self.model, settings=self.settings)
        needed = "eos_token" if self.form in ("completion", "text") else "pad_token"
        if getattr(tokenizer, needed) is None:
            at = self.own_tokenizer or f"task.model={self.model}"
            raise ConfigurationError(f"the tokenizer of {at} has no {needed}; set task.model")
        return tokenizer

    @property
    def share(self) -> tuple[int, int]:
        """(number of this process, number of the trainer's processes)."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    @property
    def positions(self) -> float:
        """The most tokens that the trainer's model can read; inf if there is no limit."""
        return positions(self.trainer.lightning_module) if self.trainer else inf

    def prepare_data(self) -> None:
        """Fill the cache in one process before the others read it."""
        if self.examples:
            return
        function, options = self.recipe
        examples = {}
        for split, whole in self.rows.items():
            rows = spread(whole, self.limit)
            made = rows.map(
                function,
                batched=True,
                fn_kwargs={**options, "tokenizer": self.tokenizer},
                remove_columns=rows.column_names,
                features=self.features,
                new_fingerprint=fingerprint(function, rows._fingerprint, options, self.tokenizer),
                desc=f"tokenising {split}",
            )
            lengths = _lengths(made)
            if not len(made):
                few = f"no example of {split} has at most {self.max_length} tokens"
                raise ConfigurationError(f"{few}; set task.max_length")
            if lengths.max() > self.positions:
                most = f"at most {self.positions}, which task.model={self.model} reads"
                raise ConfigurationError(f"task.max_length must be {most}")
            examples[split] = made
            counts = {"rows": len(rows), "examples": len(made), "tokens": int(lengths.sum())}
            # Longer texts are cut to this length, longer chats and completions are left out.
            counts["at_max_length"] = int((lengths == self.max_length).sum())
            counts["too_long"] = len(rows) - len(made) if self.form in ("completion", "chat") else 0
            self.account[split] = counts | self.rows.left_out[split]
        said = {
            split: ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items() if count)
            for split, counts in self.account.items()
        }
        rank_zero_only(print_facts)(said)
        self.examples = examples

    def setup(self, stage: str) -> None:
        self.prepare_data()
        if stage == "fit":
            # A test comes after the whole training, and what its loaders refuse is known now.
            self.test_dataloader()

    def train_dataloader(self) -> ResumableLoader:
        examples: Any = self.examples["train"]
        lengths = _lengths(examples)
        return ResumableLoader(examples, lengths, self.batch_size, self.seed, self.collate, share=self.share)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [self.evaluation(spread(self.examples["val"], self.val_examples))]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        val = spread(self.examples["val"], self.val_examples)
        parts = self.examples["test"], val, spread(self.examples["train"], len(val))
        return [self.evaluation(part) for part in parts]

    def evaluation(self, examples: datasets.Dataset, collate: Any = None) -> DataLoader[Any]:
        """A loader of each example once, sorted by length; ``collate`` may make other batches than in training."""
        # Batches of texts with similar lengths need less padding.
        ordered: Any = examples.select(np.argsort(_lengths(examples), kind="stable"))
        batches = evaluation_batches(len(ordered), self.evaluation_factor * self.batch_size, self.share)
        return DataLoader(ordered, batch_sampler=batches, collate_fn=collate or self.collate)


def _lengths(examples: datasets.Dataset) -> Any:
    return examples.select_columns("length").with_format("numpy")[:]["length"]
