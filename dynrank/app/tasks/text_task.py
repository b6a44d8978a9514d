"""Batches of tokenised texts, the common part of dynrank's own tasks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from dynrank.app.tasks.data.labels import counted
from dynrank.app.tasks.data.splits import Checked, rows_by_split
from dynrank.app.tasks.data.stored import column_of, processes, quiet, system_prompt
from dynrank.app.tasks.loader import ResumableLoader, evaluation_batches, spread
from dynrank.errors import ConfigurationError

# Increase this number when the making of examples changes, so that old examples in a cache are not used.
CACHED = 10


@dataclass(frozen=True)
class Recipe:
    """How rows become examples.

    Attributes:
        make: function of a batch of rows (a mapping of columns), ``tokenizer``, ``max_length`` and ``options``; returns
            examples.
        features: features of the examples. ``length`` is the number of tokens, ``cut`` whether a text was cut there.
        options: everything except the rows, the tokenizer and ``max_length`` that changes the examples.
    """

    make: Callable[..., Any]
    features: datasets.Features
    options: Mapping[str, Any]


class TextTask(LightningDataModule):
    """Batches of tokenised examples, divided among the trainer's processes (``use_distributed_sampler=False``).

    Training draws them by :class:`dynrank.app.tasks.loader.ResumableLoader`. A validation and a test use each example
    once, sorted by length; a test uses the test examples, the validation examples, and as many training examples.
    Subclasses define :attr:`recipe` and :meth:`collate`, and describe the arguments. Data and examples from files are
    memory-mapped.

    Attributes:
        evaluation_factor: how many times as many examples a batch of a validation or test has at most as in training.
        examples: {split: its examples}, once they are made.
        account: {split: its counts}.
    """

    evaluation_factor: int

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
    def recipe(self) -> Recipe:
        """The recipe that makes examples from rows."""
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
            at = f"in {self.own_tokenizer!r}" if self.own_tokenizer else f"of task.model={self.model}"
            raise ConfigurationError(f"the tokenizer {at} has no {needed}; set task.model")
        # The hash is computed before the first use, which changes the internal state of the tokenizer.
        self._tokenizer_hash = Hasher.hash(tokenizer)
        return tokenizer

    def examples_of(self, rows: datasets.Dataset, split: str) -> datasets.Dataset:
        """The examples of a split's rows, from the cache on disk if they were made before."""
        # Reading self.tokenizer sets its hash.
        recipe = self.recipe
        options = {"max_length": self.max_length, **recipe.options}
        tokenizer = self.tokenizer
        if self.form == "classification":
            # Each row becomes an example, so the others need none.
            rows = spread(rows, self.limit)
        how = (recipe.make.__qualname__, options)
        key = (CACHED, rows._fingerprint, self._tokenizer_hash, type(tokenizer).__name__, *how)
        with quiet():
            made = rows.map(
                recipe.make,
                batched=True,
                fn_kwargs={"tokenizer": tokenizer, **options},
                remove_columns=rows.column_names,
                features=recipe.features,
                keep_in_memory=not rows.cache_files,
                new_fingerprint=Hasher.hash(str(key)),
                num_proc=processes(len(rows)),
                desc=f"tokenising {split}",
            )
        if not len(made):
            raise ConfigurationError(f"no example of {split} has at most {self.max_length} tokens; set task.max_length")
        whole = made
        made = spread(made, self.limit)
        self.account[split] = SplitAccount(
            rows=len(rows),
            examples=len(made),
            tokens=int(_lengths(made).sum()),
            max_length=self.max_length,
            # Texts are cut instead.
            left_out=len(rows) - len(whole) if self.form != "text" else 0,
            cut=int(column_of(whole, "cut").to_numpy().sum()),
            classes=counted(rows) if "label" in rows.column_names else {},
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
        if stage == "fit" and self.trainer:
            self._refuse_empty(self.trainer, "train", lambda: [self.train_dataloader()])
            self._refuse_empty(self.trainer, "val", self.val_dataloader)
            self._refuse_empty(self.trainer, "test", self.test_dataloader)

    def _refuse_empty(self, trainer: Any, split: str, loaders: Callable[[], Sequence[DataLoader[Any]]]) -> None:
        """Refuse a share of the batches of ``split`` that leaves none of one of its loaders; Lightning would, too."""
        limit = getattr(trainer, f"limit_{split}_batches")
        is_share = isinstance(limit, float) and 0 < limit < 1
        # A test comes after the whole training, and what its loaders refuse is known now.
        if not is_share and (split != "test" or limit == 0):
            return
        whole, *others = loaders()
        least = min([whole, *others], key=len)
        if not is_share or int(len(least) * limit) > 0:
            return
        name = f"limit_{split}_batches"
        if split != "test" and trainer.overfit_batches:
            name = "overfit_batches"
        prompts = "" if split == "train" or least.collate_fn == self.collate else " (prompts for generation)"
        raise ConfigurationError(
            f"trainer.{name}={limit} takes a share of each part of the {split} data, and leaves no batch of one that "
            f"has {len(least)}{prompts}; set trainer.{name}={max(1, int(len(whole) * limit))}, a number of batches of "
            "each part, or 1.0"
        )

    def _make_examples(self) -> None:
        if not self.examples:
            examples = {split: self.examples_of(rows, split) for split, rows in self.rows.items()}
            most = self.positions
            if max(_lengths(part).max() for part in examples.values()) > most:
                raise ConfigurationError(f"task.max_length must be at most {most}, which task.model={self.model} reads")
            self.examples = examples
            self.account["train"].dropped = self.rows.dropped
            for split, count in self.rows.unusable.items():
                self.account[split].unusable = count
            for split, counts in self.rows.ambiguous.items():
                self.account[split].ambiguous = dict(counts)
            rank_zero_only(print_account)(self.account)

    def train_dataloader(self) -> ResumableLoader:
        examples: Any = self.examples["train"]
        lengths = _lengths(examples)
        trainer: Any = self.trainer
        rest: Any = {"share": self.share, "overfit": 0 if trainer is None else trainer.overfit_batches}
        return ResumableLoader(examples, lengths, self.batch_size, self.seed, self.collate, **rest)

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
