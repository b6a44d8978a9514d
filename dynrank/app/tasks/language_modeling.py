"""Training of a causal language model with LoRA on answers, chats or texts, with metrics of its answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.text import Perplexity, SacreBLEUScore

from dynrank.app.models.generating import end_of_turn_of, greedy_texts
from dynrank.app.models.pretrained import load_causal_lm
from dynrank.app.tasks.adapter_module import IGNORED, AdapterModule
from dynrank.app.tasks.examples import FEATURES, make_examples
from dynrank.app.tasks.loader import spread
from dynrank.app.tasks.text_task import TextTask
from dynrank.errors import ConfigurationError, Count, Steps, checked_call


class WholeAnswers(MeanMetric):
    """Share of the answers that greedy decoding generates exactly, with their end.

    One forward is enough: if each token of the answer is the most probable one after the true tokens before it, greedy
    decoding generates these tokens.
    """

    def update(self, logits: Tensor, labels: Tensor) -> None:  # type: ignore[override]
        """Add logits (batch, length, vocabulary) and labels (batch, length) of the next token."""
        super().update(((logits.argmax(-1) == labels) | (labels == IGNORED)).all(1).float())


class LanguageModeling(TextTask):
    """Prompts with answers, chats or texts as a task.

    A batch has int64 input_ids, attention_mask and labels (batch, length), padded on the right; labels are -100 at
    positions without a loss. Examples of more than ``max_length`` tokens are left out, and ``account`` counts them;
    texts are cut into pieces. A batch for generation has input_ids and attention_mask of prompts, padded on the left,
    and the texts in ``answers``; the answer of a chat is the assistant's last turn.

    Other arguments are those of :class:`dynrank.app.tasks.text_task.TextTask`.

    Args:
        form: form of the rows: completion, chat or text.
        packed: with form=text, the texts are one stream, with the tokenizer's end token after each, that is cut into
            examples of ``max_length`` tokens; otherwise each text is cut alone.
        max_length: largest number of tokens of a prompt with answer and end, of a chat, or of a piece of text.
        val_generate: for how many validation examples each validation generates answers and measures their BLEU and
            exact match; 0: for none.
        generate: for how many test examples a test does so.
        max_new_tokens: longest generated answer in tokens; examples with longer answers, or whose prompts leave no
            positions of the model for it, are not used for generation.
    """

    evaluation_factor = 2
    features = FEATURES
    final = ("train/loss", "val/loss")

    @checked_call
    def __init__(
        self,
        model: str,
        data: Any,
        *,
        form: Literal["completion", "chat", "text"] = "completion",
        packed: bool = False,
        batch_size: Count = 8,
        max_length: Count = 256,
        val_examples: Count | None = None,
        val_generate: Steps = 0,
        generate: Steps = 0,
        max_new_tokens: Count = 64,
        seed: int = 0,
        limit: Count | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        sizes: Any = {"batch_size": batch_size, "max_length": max_length, "limit": limit, "val_examples": val_examples}
        super().__init__(model, data, form, **sizes, seed=seed, settings=settings)
        self.packed = packed
        self.val_generate = val_generate
        self.generate = generate
        self.max_new_tokens = max_new_tokens
        if packed and form != "text":
            raise ConfigurationError(f"task.packed must go with task=text, got task.form={form}; set task.packed=false")
        if form == "text" and (val_generate or generate):
            raise ConfigurationError("texts have no answers; set task.val_generate=0 and task.generate=0")

    @property
    def metrics(self) -> tuple[str, ...]:
        answers = ("val/accuracy",) if self.form != "text" else ()
        written = ("val/bleu", "val/exact_match") if self.val_generate else ()
        return ("train/loss", "val/loss", "val/perplexity", *answers, *written)

    def module(self, lora: Mapping[str, Any], optimizer: Mapping[str, Any], *, on_meta: bool = False) -> LanguageModel:
        written: Any = {"max_new_tokens": self.max_new_tokens, "answers": self.form != "text"}
        if self.form == "chat" and not self.tokenizer.chat_template:
            raise ConfigurationError(f"the tokenizer of task.model={self.model} has no chat template; set task.model")
        # The rows are checked before the weights are loaded, so that faults are reported early.
        if not on_meta and self.rows and self.form == "chat":
            written["end_of_turn"] = end_of_turn_of(self.tokenizer)
        model = load_causal_lm(self.model, settings=self.settings, on_meta=on_meta)
        return LanguageModel(model, None if on_meta else self.tokenizer, lora, optimizer, **written)

    @property
    def recipe(self) -> tuple[Callable[..., Any], dict[str, Any]]:
        return make_examples, {"max_length": self.max_length, "form": self.form, "packed": self.packed}

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        padded = self._padded("right", [example["input_ids"] for example in examples])
        learned = pad_sequence([torch.tensor(example["learned"]) for example in examples], True)
        return {**padded, "labels": padded["input_ids"].where(learned, IGNORED)}

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [*super().val_dataloader(), *self._to_write("val", self.val_generate)]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return [*super().test_dataloader(), *self._to_write("test", self.generate)]

    def _to_write(self, split: str, count: int) -> list[DataLoader[Any]]:
        """[a loader of ``count`` prompts for generation], or []."""
        if not count:
            return []
        rows = self.examples[split]
        sizes = zip(rows["length"], rows["prompt_length"], map(len, rows["asked"]), strict=True)
        new = self.max_new_tokens
        # The last token of an answer is not read.
        longest = self.positions - new + 1
        short = [i for i, (n, prompt, asked) in enumerate(sizes) if n - prompt <= new and asked <= longest]
        if not short:
            raise ConfigurationError(
                f"no {split} example has an answer of up to {new} tokens and leaves the model positions for it; set "
                "task.max_new_tokens"
            )
        return [self.evaluation(spread(rows.select(short), count), self._collate_prompts)]

    def _collate_prompts(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        prompts = self._padded("left", [example["asked"] for example in examples])
        return {**prompts, "answers": [example["answer"] for example in examples]}

    def _padded(self, side: str, ids: list[list[int]]) -> dict[str, Tensor]:
        return dict(self.tokenizer.pad({"input_ids": ids}, padding_side=side, return_tensors="pt"))


class LanguageModel(AdapterModule):
    """A causal language model with LoRA.

    The loss is the mean cross-entropy of the tokens that are learned. With it perplexity is measured; and, if there are
    ``answers``, accuracy: the share of answers that greedy decoding would generate exactly. Where it generates answers,
    BLEU and exact match are measured, too.

    Arguments are those of :class:`LanguageModeling` and :class:`AdapterModule`; and ``end_of_turn``, the token that
    ends an answer in chats.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        lora: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        max_new_tokens: int = 64,
        answers: bool = True,
        end_of_turn: str | None = None,
    ) -> None:
        quality = {}
        written = {}
        for split in ("val", "test"):
            right = {"accuracy": WholeAnswers()} if answers else {}
            # Metrics are not grouped, because two may be equal by chance.
            options: Any = {"prefix": f"{split}/", "compute_groups": False}
            quality[split] = MetricCollection({"perplexity": Perplexity(IGNORED), **right}, **options)
            written[split] = SacreBLEUScore()
        super().__init__(model, lora, optimizer, quality)
        # A run that is resumed must have the same.
        self.save_hyperparameters({"optimizer": dict(optimizer)})
        self.written = nn.ModuleDict(written)
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.end_of_turn = end_of_turn

    def predict(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        masked = {key: batch[key] for key in ("input_ids", "attention_mask")}
        logits: Tensor = self.model(**masked, use_cache=False).logits
        # Each position predicts the next token.
        return logits[:, :-1].float(), batch["labels"][:, 1:]

    def evaluate(self, batch: dict[str, Any], split: str) -> None:
        if "answers" not in batch:
            super().evaluate(batch, split)
            return
        texts = self.continuations(batch["input_ids"], batch["attention_mask"])
        bleu: Any = self.written[split]
        bleu.update(texts, [[answer] for answer in batch["answers"]])
        options: Any = {"batch_size": float(len(texts)), "add_dataloader_idx": False}
        self.log(f"{split}/bleu", bleu, **options)
        same = [text.strip() == answer.strip() for text, answer in zip(texts, batch["answers"], strict=True)]
        # The share of the texts that are the answer, but for blanks around both.
        self.log(f"{split}/exact_match", sum(same) / len(same), sync_dist=True, **options)

    def continuations(self, input_ids: Tensor, attention_mask: Tensor) -> list[str]:
        """What greedy decoding writes after prompts, int64 (batch, length), which are padded on the left."""
        return greedy_texts(
            self.model,
            self.tokenizer,
            input_ids,
            attention_mask,
            self.max_new_tokens,
            end_of_turn=self.end_of_turn,
            # Each forward gathers the shards of all processes, so all processes need the same number of forwards.
            synced=self.device_mesh is not None,
        )
