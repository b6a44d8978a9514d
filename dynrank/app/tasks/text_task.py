"""Batches of tokenised texts, the common part of dynrank's own tasks."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain
from math import inf
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.fingerprint import Hasher
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader

from dynrank.adapters.sidecar_files import Inputs, tokenizer_source
from dynrank.app.models.names import ModelSettings
from dynrank.app.models.pretrained import load_tokenizer, positions
from dynrank.app.tasks.account import SplitAccount, print_account
from dynrank.app.tasks.data.columns import Form
from dynrank.app.tasks.data.splits import Checked, labels_of, rows_by_split
from dynrank.app.tasks.data.stored import quiet, system_prompt
from dynrank.app.tasks.loader import ResumableLoader, evaluation_batches, spread
from dynrank.errors import ConfigurationError

# Increase this number when the making of examples changes, so that old examples in a cache are not used.
CACHED = 11


class TextTask(LightningDataModule):
    """Batches of tokenised examples, divided among the trainer's processes (``use_distributed_sampler=False``).

    Training draws them by :class:`dynrank.app.tasks.loader.ResumableLoader`. A validation and a test use each example
    once, sorted by length; a test uses the test examples, the validation examples, and as many training examples.
    Subclasses define :attr:`options`, :meth:`make` and :meth:`collate`, and describe the arguments. Data and examples
    from files are memory-mapped.

    Attributes:
        evaluation_factor: how many times as many examples a batch of a validation or test has at most as in training.
        features: features of the examples; ``length`` is the number of tokens.
        examples: {split: its examples}, once they are made.
        account: {split: its counts}.
    """

    evaluation_factor: int
    features: datasets.Features

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
        self.account: dict[str, SplitAccount] = {}

    @property
    def options(self) -> Sequence[Any]:
        """Everything except the rows and the tokenizer that changes the examples."""
        raise NotImplementedError

    def make(self, rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """The columns of :attr:`features` for a batch of rows."""
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
        system = system_prompt(rows["train"]) if self.form == "chat" else None
        return Inputs(self.form, columns, system, self.max_length)

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
        # The hash is computed before the first use, which changes the internal state of the tokenizer.
        self._tokenizer_hash = Hasher.hash(tokenizer)
        return tokenizer

    def examples_of(self, rows: datasets.Dataset, split: str) -> datasets.Dataset:
        """The examples of a split's rows, from the cache on disk if they were made before."""
        # This is read before its hash.
        tokenizer = self.tokenizer
        key = (CACHED, rows._fingerprint, self._tokenizer_hash, type(tokenizer).__name__, self.form, *self.options)
        quiet()
        made = rows.map(
            self.make,
            batched=True,
            remove_columns=rows.column_names,
            features=self.features,
            new_fingerprint=Hasher.hash(str(key)),
            desc=f"tokenising {split}",
        )
        if not len(made):
            raise ConfigurationError(f"no example of {split} has at most {self.max_length} tokens; set task.max_length")
        classifies = self.form == "classification"
        self.account[split] = SplitAccount(
            rows=len(rows),
            examples=len(made),
            tokens=int(_lengths(made).sum()),
            # Texts are cut instead.
            left_out=len(rows) - len(made) if self.form != "text" else 0,
            cut=sum(made["cut"]) if classifies else 0,
            classes=dict(Counter(chain.from_iterable(labels_of(rows))).most_common()) if classifies else {},
        )
        return made

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
        self._make_examples()

    def setup(self, stage: str) -> None:
        self._make_examples()
        if stage == "fit":
            # A test comes after the whole training, and what its loaders refuse is known now.
            self.test_dataloader()

    def _make_examples(self) -> None:
        if not self.examples:
            rows = {split: spread(part, self.limit) for split, part in self.rows.items()}
            examples = {split: self.examples_of(part, split) for split, part in rows.items()}
            most = self.positions
            if max(_lengths(part).max() for part in examples.values()) > most:
                raise ConfigurationError(f"task.max_length must be at most {most}, which task.model={self.model} reads")
            self.examples = examples
            self.account["train"].dropped = self.rows.dropped
            for split, count in self.rows.unusable.items():
                self.account[split].unusable = count
            rank_zero_only(print_account)(self.account)

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
