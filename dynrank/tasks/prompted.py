"""A causal language model with LoRA that learns what stands behind prompts: batches, loss, optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from dynrank.distributed.sharding import shard_frozen
from dynrank.errors import ConfigurationError
from dynrank.layers.finding import adapter_parameters
from dynrank.layers.placing import add_lora
from dynrank.models.pretrained import load_causal_lm, load_tokenizer
from dynrank.tasks.loader import ResumableLoader, evaluation_batches, spread, weight
from dynrank.tasks.optimizers import make_optimizer

FINAL = ("final/val", "final/train")  # what a test evaluates in its second and third loader
IGNORED = -100  # label of a token that is not learned: of the prompt, and of padding


@dataclass(frozen=True)
class Prompted:
    """Token ids of a prompt and of its answer, and what they were made of."""

    prompt: list[int]
    answer: list[int]  # with the token that ends it
    source: Any

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


class PromptedData(LightningDataModule):
    """Tokenised prompts and answers, shared out among the trainer's processes; :meth:`texts` says which.

    A batch has int64 input_ids, attention_mask and labels (batch, length), padded on the right; labels are -100 where
    there is nothing to learn. Examples that do not fit whole into ``max_length`` are left out.

    Args:
        model: short name, folder, GGUF file or hub name of the model, for its tokenizer.
        batch_size: training examples per batch of each process; evaluation takes twice as many.
        max_length: tokens of prompt, answer and end.
        seed: of the splits and of the order of the batches.
        val_count: examples that a validation takes; None for all. The test takes all.
        limit: keep only this many examples of each split (for trying things out); None keeps all.

    Attributes:
        noun: what an example is, in messages.
    """

    noun = "examples"

    def __init__(
        self, model: str, *, batch_size: int, max_length: int, seed: int, val_count: int | None, limit: int | None
    ) -> None:
        super().__init__()
        self.model, self.batch_size, self.max_length, self.seed = model, batch_size, max_length, seed
        self.val_count, self.limit = val_count, limit
        self.tokenizer: Any = None
        self.examples: dict[str, Sequence[Prompted]] = {}

    def texts(self) -> Mapping[str, Sequence[tuple[str, str, Any]]]:
        """(prompt, answer, what they were made of) by split: train, val and test."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.model)
            self.examples = {name: spread(self._tokenised(part), self.limit) for name, part in self.texts().items()}
            empty = [name for name, examples in self.examples.items() if not examples]
            if empty:
                raise ConfigurationError(
                    f"none of the {self.noun} of {empty} fits into {self.max_length} tokens; set task.max_length"
                )

    def train_dataloader(self) -> ResumableLoader:
        examples = self.examples["train"]
        if len(examples) < self.batch_size * self.share[1]:
            raise ConfigurationError(
                f"task.batch_size must be at most the {len(examples)} training {self.noun}, got {self.batch_size} in "
                f"each of {self.share[1]} processes"
            )
        options: Any = {"collate_fn": self._collate, "share": self.share}
        lengths = [len(example) for example in examples]
        return ResumableLoader(examples, lengths, self.batch_size, self.seed, **options)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return self.evaluation(spread(self.examples["val"], self.val_count))

    def test_dataloader(self) -> Any:
        return [self.evaluation(self.examples["test"]), *self.final_dataloaders()]

    def final_dataloaders(self) -> list[DataLoader[Any]]:
        """Of the examples of a validation, and of as many training examples, always the same ones."""
        val = spread(self.examples["val"], self.val_count)
        return [self.evaluation(part) for part in (val, spread(self.examples["train"], len(val)))]

    @property
    def share(self) -> tuple[int, int]:
        """(number of this process, how many the trainer has)."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def evaluation(self, examples: Sequence[Prompted], collate: Any = None) -> DataLoader[Any]:
        """Each of the examples once, by length; ``collate`` makes other batches of them than training has."""
        ordered: Any = sorted(examples, key=len)
        batches = evaluation_batches(len(ordered), self.batch_size * 2, self.share)
        return DataLoader(ordered, batch_sampler=batches, collate_fn=collate or self._collate)

    def _tokenised(self, texts: Sequence[tuple[str, str, Any]]) -> list[Prompted]:
        prompts = self.tokenizer([prompt for prompt, _, _ in texts])["input_ids"]
        answers = self.tokenizer([answer for _, answer, _ in texts], add_special_tokens=False)["input_ids"]
        examples = [
            Prompted(prompt, [*answer, self.tokenizer.eos_token_id], source)
            for prompt, answer, (_, _, source) in zip(prompts, answers, texts, strict=True)
        ]
        return [example for example in examples if len(example) <= self.max_length]

    def _collate(self, examples: Sequence[Prompted]) -> dict[str, Tensor]:
        rows = [torch.tensor([*example.prompt, *example.answer]) for example in examples]
        targets = [torch.tensor([IGNORED] * len(example.prompt) + example.answer) for example in examples]
        return {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            "labels": pad_sequence(targets, batch_first=True, padding_value=IGNORED),
        }


class PromptedModel(LightningModule):
    """A causal language model with LoRA; ``self.model`` is the transformers model that is exported.

    Logged is the mean cross-entropy of the tokens of answers; by a test also that of a validation's examples and of as
    many training examples, at the final weights. What is evaluated beyond that is the subclass's.

    Args:
        model: short name, folder, GGUF file or hub name.
        lora: keyword arguments of :func:`dynrank.add_lora`.
        optimizer: keyword arguments of :func:`dynrank.tasks.optimizers.make_optimizer`.
        on_meta: build the model without weights (to look at its layers).
    """

    def __init__(self, model: str, lora: Mapping[str, Any], optimizer: Mapping[str, Any], on_meta: bool) -> None:
        super().__init__()
        self.source, self.optimizer_options = model, dict(optimizer)
        self.model = load_causal_lm(self.source, on_meta=on_meta)
        add_lora(self.model.train(), **lora)

    def configure_model(self) -> None:
        if self.device_mesh is not None:  # under ModelParallelStrategy; load_from_checkpoint calls this, too
            shard_frozen(self.model, self.device_mesh["data_parallel"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = _loss(*self.predict(batch))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        adapter = adapter_parameters(self.model)
        return make_optimizer(adapter, [], int(self.trainer.estimated_stepping_batches), **self.optimizer_options)

    def evaluate(self, batch: dict[str, Tensor], split: str) -> tuple[Tensor, Tensor]:
        """Log the loss of a batch of ``split``; returns what :meth:`predict` does."""
        logits, labels = self.predict(batch)
        options: Any = {"batch_size": weight(int((labels != IGNORED).sum())), "add_dataloader_idx": False}
        shown = split not in FINAL
        self.log(f"{split}/loss", _loss(logits, labels), prog_bar=shown, sync_dist=True, **options)
        return logits, labels

    def predict(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (batch, length - 1, vocabulary) in float32 and the labels of what comes next, (batch, length - 1)."""
        masked = {key: batch[key] for key in ("input_ids", "attention_mask")}
        logits: Tensor = self.model(**masked, use_cache=False).logits
        return logits[:, :-1].float(), batch["labels"][:, 1:]


def check_counts(counts: Mapping[str, Any], optional: Mapping[str, Any]) -> None:
    """Refuse values of ``task`` that are not ints of at least 1; those that are ``optional`` may be None.

    Raises:
        ConfigurationError: naming the first.
    """
    for name, value in {**counts, **{key: value for key, value in optional.items() if value is not None}}.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigurationError(f"task.{name} must be an int of at least 1, got {value!r}")


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
