"""Signature and docstring of a function in, its body out: a language model with LoRA on Python's own library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from torchmetrics.text import Perplexity, SacreBLEUScore

from dynrank.errors import ConfigurationError
from dynrank.models.pretrained import load_tokenizer
from dynrank.tasks.data.stdlib import Function, FunctionSplits, parses, stdlib_functions
from dynrank.tasks.loader import spread, weight
from dynrank.tasks.prompted import FINAL, IGNORED, Prompted, PromptedData, PromptedModel, check_counts


class FunctionsData(PromptedData):
    """Tokenised functions of the standard library: signature and docstring as prompts, bodies as answers.

    Batches are those of :class:`PromptedData`. A batch to complete has input_ids and attention_mask of prompts, padded
    on the left, and ``functions``.

    Args:
        model: short name, folder, GGUF file or hub name of the model, for its tokenizer.
        batch_size: training examples per batch of each process; evaluation takes twice as many.
        max_length: tokens of signature, docstring, body and end.
        modules: see :func:`dynrank.tasks.data.stdlib.stdlib_functions`.
        seed: of the splits and of the order of the batches.
        val_functions: that a validation takes; None for all. The test takes all.
        val_generate: validation functions that each validation completes; 0 leaves it out.
        generate: test functions that are completed; 0 leaves it out.
        max_new_tokens: that a completion may have; functions with longer bodies are not completed.
        limit: keep only this many functions of each split (for trying things out); None keeps all.
    """

    noun = "functions"

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
        counts = {"batch_size": batch_size, "max_length": max_length, "max_new_tokens": max_new_tokens}
        check_counts(counts, {"val_functions": val_functions, "limit": limit})
        for name, value in {"val_generate": val_generate, "generate": generate}.items():
            if not isinstance(value, int) or value < 0:
                raise ConfigurationError(f"task.{name} must be an int of at least 0, got {value!r}")
        options: Any = {"batch_size": batch_size, "max_length": max_length, "seed": seed, "limit": limit}
        super().__init__(model, val_count=val_functions, **options)
        self.modules, self.max_new_tokens = modules, max_new_tokens
        self.val_generate, self.generate = val_generate, generate

    def texts(self) -> Mapping[str, Sequence[tuple[str, str, Function]]]:
        splits: FunctionSplits = stdlib_functions(self.modules, self.seed)
        return {split: [(f.prompt, f.body, f) for f in functions] for split, functions in vars(splits).items()}

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return self._evaluations("val", self.val_count, self.val_generate)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        test, *completed = self._evaluations("test", None, self.generate)
        return [test, *self.final_dataloaders(), *completed]

    def _evaluations(self, split: str, count: int | None, generate: int) -> list[DataLoader[Any]]:
        """Of ``count`` functions with their bodies, and where some are completed, of ``generate`` prompts."""
        examples = self.examples[split]
        loaders = [self.evaluation(spread(examples, count))]
        short = [example for example in examples if len(example.answer) <= self.max_new_tokens]
        if generate and not short:
            raise ConfigurationError(
                f"no {split} function has a body of up to {self.max_new_tokens} tokens; set task.max_new_tokens"
            )
        if generate:
            loaders.append(self.evaluation(spread(short, generate), self._collate_prompts))
        return loaders

    def _collate_prompts(self, examples: Sequence[Prompted]) -> dict[str, Any]:
        rows = [torch.tensor(example.prompt) for example in examples]
        left: Any = {"batch_first": True, "padding_side": "left"}
        return {
            "input_ids": pad_sequence(rows, padding_value=self.tokenizer.pad_token_id, **left),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], **left),
            "functions": [(example.source.prompt, example.source.body) for example in examples],
        }


class BodyWriter(PromptedModel):
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
        lora, optimizer = dict(lora), dict(optimizer)
        super().__init__(model, lora, optimizer, on_meta)
        self.save_hyperparameters("model", "lora", "optimizer", "max_new_tokens")
        self.max_new_tokens = max_new_tokens
        self.val_perplexity, self.test_perplexity = (Perplexity(ignore_index=IGNORED) for _ in range(2))
        self.val_bleu, self.test_bleu = SacreBLEUScore(), SacreBLEUScore()

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.source)

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        if "functions" in batch:
            self._complete(batch, "val", self.val_bleu)
        else:
            self._evaluate(batch, "val", self.val_perplexity)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        if "functions" in batch:
            self._complete(batch, "test", self.test_bleu)
        elif dataloader_idx:
            self.evaluate(batch, FINAL[dataloader_idx - 1])
        else:
            self._evaluate(batch, "test", self.test_perplexity)

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
        options: Any = {"batch_size": weight(len(written)), "add_dataloader_idx": False}
        self.log(f"{split}/bleu", bleu, **options)
        self.log_dict(shares, sync_dist=True, **options)

    def _evaluate(self, batch: dict[str, Tensor], split: str, perplexity: Perplexity) -> None:
        logits, labels = self.evaluate(batch, split)
        perplexity.update(logits, labels)
        tokens = int((labels != IGNORED).sum())
        self.log(f"{split}/perplexity", perplexity, batch_size=tokens, add_dataloader_idx=False)


class CodeCompletion:
    """The task as the command line composes it: its data, and a module for given LoRA and optimizer settings.

    Args:
        model: short name, folder, GGUF file or hub name of the model.
        max_new_tokens: of a completion.
        **data: the other arguments of :class:`FunctionsData`.

    Attributes:
        metrics: names of what is logged in training and validation.
        final: those of them that a test measures at the final weights, too.
    """

    final = ("train/loss", "val/loss")

    def __init__(self, model: str, max_new_tokens: int, **data: Any) -> None:
        self.model, self.max_new_tokens = model, max_new_tokens
        self.data = FunctionsData(model, max_new_tokens=max_new_tokens, **data)
        completed = ("val/bleu", "val/exact_match", "val/parses") if self.data.val_generate else ()
        self.metrics = ("train/loss", "val/loss", "val/perplexity", *completed)

    def module(self, lora: Mapping[str, Any], optimizer: Mapping[str, Any], *, on_meta: bool = False) -> BodyWriter:
        return BodyWriter(self.model, lora, optimizer, self.max_new_tokens, on_meta)


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
