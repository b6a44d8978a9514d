"""Signature and docstring of a function in, its body out: a language model with LoRA on Python's own library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from torchmetrics.text import Perplexity, SacreBLEUScore

from dynrank.errors import ConfigurationError
from dynrank.layers.inject import add_lora, lora_layers
from dynrank.sharding import shard_frozen
from dynrank.tasks.loader import ResumableLoader, evaluation_batches
from dynrank.tasks.optimizers import make_optimizer
from dynrank.tasks.pretrained import load_causal_lm, load_tokenizer, model_source
from dynrank.tasks.stdlib import Function, FunctionSplits, parses, stdlib_functions

_IGNORED = -100  # label of a token that is not learned: of the prompt, and of padding


@dataclass(frozen=True)
class _Example:
    function: Function
    prompt: list[int]
    body: list[int]  # with the token that ends it


class FunctionsData(LightningDataModule):
    """Tokenised functions of the standard library, shared out among the trainer's processes.

    A training or evaluation batch has int64 input_ids, attention_mask and labels (batch, length), padded on the right;
    labels are -100 where there is nothing to learn. A batch to complete has input_ids and attention_mask of prompts,
    padded on the left, and ``functions``. Functions that do not fit whole into ``max_length`` are left out.

    Args:
        model: short name, folder, GGUF file or hub name of the model, for its tokenizer.
        batch_size: training examples per batch of each process; evaluation takes twice as many.
        max_length: tokens of signature, docstring, body and end.
        modules: see :func:`dynrank.tasks.stdlib.stdlib_functions`.
        seed: of the splits and of the order of the batches.
        val_functions: that a validation takes; None for all. The test takes all.
        val_generate: validation functions that each validation completes; 0 leaves it out.
        generate: test functions that are completed; 0 leaves it out.
        max_new_tokens: that a completion may have; functions with longer bodies are not completed.
        limit: keep only this many functions of each split (for trying things out); None keeps all.
    """

    def __init__(
        self,
        model: str,
        *,
        batch_size: int,
        max_length: int,
        modules: Sequence[str] | None,
        seed: int,
        val_functions: int | None,
        val_generate: int,
        generate: int,
        max_new_tokens: int,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        counts = {"batch_size": batch_size, "max_length": max_length, "max_new_tokens": max_new_tokens}
        for name, value in {**counts, "val_functions": val_functions or 1, "limit": limit or 1}.items():
            if not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"task.{name} must be an int of at least 1, got {value!r}")
        for name, value in {"val_generate": val_generate, "generate": generate}.items():
            if not isinstance(value, int) or value < 0:
                raise ConfigurationError(f"task.{name} must be an int of at least 0, got {value!r}")
        self.model, self.batch_size, self.max_length, self.modules = model, batch_size, max_length, modules
        self.seed, self.limit, self.max_new_tokens = seed, limit, max_new_tokens
        self.val_functions, self.val_generate, self.generate = val_functions, val_generate, generate
        self.tokenizer: Any = None
        self.examples: dict[str, list[_Example]] = {}

    def setup(self, stage: str) -> None:
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(model_source(self.model))
            splits: FunctionSplits = stdlib_functions(self.modules, self.seed)
            self.examples = {name: _spread(self._examples(part), self.limit) for name, part in vars(splits).items()}
            empty = [name for name, examples in self.examples.items() if not examples]
            if empty:
                raise ConfigurationError(
                    f"no function of {empty} fits into {self.max_length} tokens; set task.max_length or task.modules"
                )

    def train_dataloader(self) -> ResumableLoader:
        examples = self.examples["train"]
        if len(examples) < self.batch_size * self.share[1]:
            raise ConfigurationError(
                f"task.batch_size must be at most the {len(examples)} training functions, got {self.batch_size} in "
                f"each of {self.share[1]} processes"
            )
        lengths = [len(example.prompt) + len(example.body) for example in examples]
        options: Any = {"collate_fn": self._collate, "share": self.share}
        return ResumableLoader(examples, lengths, self.batch_size, self.seed, **options)  # type: ignore[arg-type]

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return self._evaluations("val", self.val_functions, self.val_generate)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return self._evaluations("test", None, self.generate)

    @property
    def share(self) -> tuple[int, int]:
        """(number of this process, how many the trainer has)."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _evaluations(self, split: str, count: int | None, generate: int) -> list[DataLoader[Any]]:
        """Of ``count`` functions with their bodies, and where some are completed, of ``generate`` prompts."""
        examples = self.examples[split]
        loaders = [self._evaluation(_spread(examples, count), self._collate)]
        short = [example for example in examples if len(example.body) <= self.max_new_tokens]
        if generate and not short:
            raise ConfigurationError(
                f"no {split} function has a body of up to {self.max_new_tokens} tokens; set task.max_new_tokens"
            )
        if generate:
            loaders.append(self._evaluation(_spread(short, generate), self._collate_prompts))
        return loaders

    def _evaluation(self, examples: Sequence[_Example], collate: Any) -> DataLoader[Any]:
        ordered: Any = sorted(examples, key=lambda example: len(example.prompt) + len(example.body))
        batches = evaluation_batches(len(ordered), self.batch_size * 2, self.share)
        return DataLoader(ordered, batch_sampler=batches, collate_fn=collate)

    def _examples(self, functions: Sequence[Function]) -> list[_Example]:
        prompts = self.tokenizer([function.prompt for function in functions])["input_ids"]
        bodies = self.tokenizer([function.body for function in functions], add_special_tokens=False)["input_ids"]
        examples = [
            _Example(function, prompt, [*body, self.tokenizer.eos_token_id])
            for function, prompt, body in zip(functions, prompts, bodies, strict=True)
        ]
        return [example for example in examples if len(example.prompt) + len(example.body) <= self.max_length]

    def _collate(self, examples: Sequence[_Example]) -> dict[str, Tensor]:
        rows = [torch.tensor([*example.prompt, *example.body]) for example in examples]
        targets = [torch.tensor([_IGNORED] * len(example.prompt) + example.body) for example in examples]
        return {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            "labels": pad_sequence(targets, batch_first=True, padding_value=_IGNORED),
        }

    def _collate_prompts(self, examples: Sequence[_Example]) -> dict[str, Any]:
        rows = [torch.tensor(example.prompt) for example in examples]
        left: Any = {"batch_first": True, "padding_side": "left"}
        return {
            "input_ids": pad_sequence(rows, padding_value=self.tokenizer.pad_token_id, **left),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], **left),
            "functions": [(example.function.prompt, example.function.body) for example in examples],
        }


class BodyWriter(LightningModule):
    """A causal language model with LoRA; ``self.model`` is the transformers model that is exported.

    Logged are the mean cross-entropy of the tokens of bodies, and their perplexity; where the data has prompts to
    complete, also, of greedy completions, ``test/bleu`` or ``val/bleu`` (sacreBLEU's, with its 13a tokenisation, of
    whole bodies, in [0, 1]), ``exact_match`` (share whose first line is the body's) and ``parses`` (share that is not
    empty, and Python behind its prompt). A completion ends before the first line that is not indented.

    All arguments are plain values and are saved in checkpoints, so ``load_from_checkpoint`` needs nothing else.

    Args:
        model: short name, folder, GGUF file or hub name.
        lora: keyword arguments of :func:`dynrank.add_lora`.
        optimizer: keyword arguments of :func:`dynrank.tasks.optimizers.make_optimizer`.
        max_new_tokens: of a completion.
        on_meta: build the model without weights (to look at its layers).
    """

    def __init__(
        self,
        model: str,
        lora: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        max_new_tokens: int,
        on_meta: bool = False,
    ) -> None:
        super().__init__()
        lora, optimizer = dict(lora), dict(optimizer)
        self.save_hyperparameters("model", "lora", "optimizer", "max_new_tokens")
        self.source, self.optimizer_options, self.max_new_tokens = model_source(model), optimizer, max_new_tokens
        self.model = load_causal_lm(self.source, on_meta=on_meta)
        add_lora(self.model.train(), **lora)
        self.val_perplexity, self.test_perplexity = (Perplexity(ignore_index=_IGNORED) for _ in range(2))
        self.val_bleu, self.test_bleu = SacreBLEUScore(), SacreBLEUScore()

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.source)

    def configure_model(self) -> None:
        if self.device_mesh is not None:  # under ModelParallelStrategy; load_from_checkpoint calls this, too
            shard_frozen(self.model, self.device_mesh["data_parallel"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits, labels = self._predict(batch)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=_IGNORED)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        if "functions" in batch:
            self._complete(batch, "val", self.val_bleu)
        else:
            self._evaluate(batch, "val", self.val_perplexity)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        if "functions" in batch:
            self._complete(batch, "test", self.test_bleu)
        else:
            self._evaluate(batch, "test", self.test_perplexity)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        adapter = [p for _, layer in lora_layers(self.model) for p in (layer.lora_A, layer.lora_B)]
        return make_optimizer(adapter, [], int(self.trainer.estimated_stepping_batches), **self.optimizer_options)

    @torch.no_grad()
    def continuations(self, input_ids: Tensor, attention_mask: Tensor) -> list[str]:
        """What the model writes behind prompts, greedily, up to its end or ``max_new_tokens``.

        Args:
            input_ids: int64 (batch, length), padded on the left.
            attention_mask: of the same shape.
        """
        writer: Any = self.model
        made = writer.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            synced_gpus=self.device_mesh is not None,  # each forward gathers the shards of all processes
        )
        texts: list[str] = self.tokenizer.batch_decode(made[:, input_ids.shape[1] :], skip_special_tokens=True)
        return texts

    def _complete(self, batch: dict[str, Any], split: str, bleu: SacreBLEUScore) -> None:
        written = [_body(text) for text in self.continuations(batch["input_ids"], batch["attention_mask"])]
        prompts, bodies = zip(*batch["functions"], strict=True)
        bleu.update(written, [[body] for body in bodies])
        right = [_first_line(a) == _first_line(b) for a, b in zip(written, bodies, strict=True)]
        python = [bool(text) and parses(prompt + text) for prompt, text in zip(prompts, written, strict=True)]
        shares = {f"{split}/exact_match": sum(right) / len(right), f"{split}/parses": sum(python) / len(python)}
        options: Any = {"batch_size": len(written), "add_dataloader_idx": False}
        self.log(f"{split}/bleu", bleu, **options)
        self.log_dict(shares, sync_dist=True, **options)

    def _evaluate(self, batch: dict[str, Tensor], split: str, perplexity: Perplexity) -> None:
        logits, labels = self._predict(batch)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=_IGNORED)
        perplexity.update(logits, labels)
        options: Any = {"batch_size": int((labels != _IGNORED).sum()), "add_dataloader_idx": False}
        self.log(f"{split}/loss", loss, prog_bar=True, sync_dist=True, **options)
        self.log(f"{split}/perplexity", perplexity, **options)

    def _predict(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (batch, length - 1, vocabulary) in float32 and the labels of what comes next, (batch, length - 1)."""
        masked = {key: batch[key] for key in ("input_ids", "attention_mask")}
        logits: Tensor = self.model(**masked, use_cache=False).logits
        return logits[:, :-1].float(), batch["labels"][:, 1:]


class CodeCompletion:
    """The task as the command line composes it: its data, and a module for given LoRA and optimizer settings.

    Args:
        model: short name, folder, GGUF file or hub name of the model.
        max_new_tokens: of a completion.
        **data: the other arguments of :class:`FunctionsData`.

    Attributes:
        metrics: names of what is logged in training and validation.
    """

    def __init__(self, model: str, max_new_tokens: int, **data: Any) -> None:
        self.model, self.max_new_tokens = model, max_new_tokens
        self.data = FunctionsData(model, max_new_tokens=max_new_tokens, **data)
        completed = ("val/bleu", "val/exact_match", "val/parses") if self.data.val_generate else ()
        self.metrics = ("train/loss", "val/loss", "val/perplexity", *completed)

    def module(self, lora: Mapping[str, Any], optimizer: Mapping[str, Any], *, on_meta: bool = False) -> BodyWriter:
        return BodyWriter(self.model, lora, optimizer, self.max_new_tokens, on_meta)


def _spread(examples: list[_Example], count: int | None) -> list[_Example]:
    """``count`` examples from everywhere in the list, or all."""
    if count is None or count >= len(examples):
        return examples
    return [examples[i * len(examples) // count] for i in range(count)]


def _body(text: str) -> str:
    """What of a completion is indented: it stops before the next function, or prose."""
    kept: list[str] = []
    for line in text.split("\n")[1:]:  # the first one ends the line of the docstring
        if line.strip() and not line[0].isspace():
            break
        kept.append(line)
    return ("\n" + "\n".join(kept)).rstrip()


def _first_line(body: str) -> str:
    return next((line.strip() for line in body.split("\n") if line.strip()), "")
