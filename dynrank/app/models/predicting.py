"""Answers to texts by a stored adapter on its base model."""

from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dynrank.adapters.read import Adapter
from dynrank.adapters.sidecar_files import tokenizer_source
from dynrank.app.models.base_model import base_settings, base_source, on_base
from dynrank.app.models.generating import closing_tokens, end_of_turn_of, greedy_texts, refusal, rendered
from dynrank.app.models.pretrained import load_tokenizer, positions, read_config, set_padding
from dynrank.errors import ConfigurationError

# Rows as dynrank.app.tasks.data.rows makes them: with text, with prompt, or with messages.
Rows = Sequence[Mapping[str, Any]]


class Prompts:
    """How rows become what a stored adapter is asked; its model is not needed for that.

    Args:
        adapter: the adapter.
        base: name of the base model; None: as the adapter names it.
        system: system prompt of chats that have none.

    Attributes:
        tokenizer: the tokenizer in the adapter's folder, otherwise the base's.
    """

    def __init__(self, adapter: Adapter, base: str | None, system: str | None) -> None:
        place = tokenizer_source(Path(adapter.source), base_source(adapter, base))
        self.tokenizer = load_tokenizer(place, "--model", base_settings(adapter, base))
        self.system = system
        # An answer goes on after a decoder's prompt. What an encoder reads ends as its tokenizer ends it.
        is_read = read_config(base_source(adapter, base), "--model", base_settings(adapter, base)).is_encoder_decoder
        self._closing = 0 if is_read else closing_tokens(self.tokenizer)

    def refusals(self, chats: Rows) -> list[str | None]:
        """For each chat why the tokenizer's template refuses it; None if it does not refuse."""
        return [refusal(self.tokenizer, self.turns(row)) for row in chats]

    def tokens(self, rows: Rows, **options: Any) -> Any:
        """What the tokenizer makes of the prompts of rows by ``options``."""
        chats = "messages" in rows[0]
        prompts = [
            rendered(self.tokenizer, self.turns(row), ask=True) if chats else row.get("prompt", row.get("text"))
            for row in rows
        ]
        if chats or not self._closing:
            return self.tokenizer(prompts, add_special_tokens=not chats, **options)
        ids = [own[: len(own) - self._closing] for own in self.tokenizer(prompts, verbose=False)["input_ids"]]
        return self.tokenizer.pad({"input_ids": ids}, **options) if "padding" in options else {"input_ids": ids}

    def turns(self, row: Mapping[str, Any]) -> Sequence[Mapping[str, str]]:
        """The messages of a chat, which begin with the system prompt, if there is one."""
        messages: Sequence[Mapping[str, str]] = row["messages"]
        if self.system is not None and messages[0]["role"] != "system":
            return [{"role": "system", "content": self.system}, *messages]
        return messages


class Answerer:
    """A stored adapter on its base model, ready to answer.

    Args:
        adapter: the adapter.
        base: name of the base model; None: as the adapter names it.
        prompts: how rows are asked.
        max_length: number of tokens after which a classifier's text is cut; None: as many as the model reads.
        max_new_tokens: largest number of tokens to generate for a row.

    Attributes:
        writes: whether the model generates text; otherwise it classifies.
        several: whether a text may have several labels.
        positions: the most tokens that the model can read; inf if there is no such limit.
    """

    def __init__(
        self, adapter: Adapter, base: str | None, prompts: Prompts, *, max_length: int | None, max_new_tokens: int
    ) -> None:
        self.model = answering(adapter, base)
        self.prompts = prompts
        self.tokenizer = prompts.tokenizer
        set_padding(self.model, self.tokenizer.pad_token_id)
        self.positions = positions(self.model)
        self.max_length = max_length
        if self.positions < inf:
            self.max_length = int(min(max_length or self.tokenizer.model_max_length, self.positions))
        self.max_new_tokens = max_new_tokens
        self.writes: bool = self.model.can_generate()
        self.several = self.model.config.problem_type == "multi_label_classification"

    @torch.no_grad()
    def labels(self, rows: Rows) -> list[list[tuple[str, float]]]:
        """For each row of a batch all labels with their probabilities, the most likely first."""
        texts = [row["text"] for row in rows]
        options = {"padding": True, "truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
        made = self.tokenizer(texts, **options, return_token_type_ids=False).to(self.model.device)
        logits = self.model(**made).logits.float()
        names = self.model.config.id2label
        found = []
        for row in logits.sigmoid() if self.several else logits.softmax(-1):
            values, indices = row.sort(descending=True)
            found.append([(names[i], value) for i, value in zip(indices.tolist(), values.tolist(), strict=True)])
        return found

    def texts(self, rows: Rows) -> list[str]:
        """The text that greedy decoding generates for each row of a batch."""
        # An answer goes on from a decoder's prompt. An encoder may count positions from the begin of its row.
        side = "right" if self.model.config.is_encoder_decoder else "left"
        inputs = self.prompts.tokens(rows, padding=True, padding_side=side, return_tensors="pt").to(self.model.device)
        tokens = inputs["input_ids"], inputs["attention_mask"]
        is_turn = "messages" in rows[0]
        end = end_of_turn_of(self.tokenizer, self.prompts.turns(rows[0])) if is_turn else None
        options: Any = {"end_of_turn": end, "is_turn": is_turn}
        return greedy_texts(self.model, self.tokenizer, *tokens, self.max_new_tokens, **options)

    @property
    def longest(self) -> float:
        """The most tokens of a prompt that leave positions for ``max_new_tokens`` of an answer."""
        # The last token of an answer is not read; an encoder reads the prompt alone.
        return self.positions - (0 if self.model.config.is_encoder_decoder else self.max_new_tokens - 1)

    def lengths(self, rows: Rows) -> list[int]:
        """The number of tokens of each row's prompt."""
        return [len(ids) for ids in self.prompts.tokens(rows, verbose=False)["input_ids"]]


def answering(adapter: Adapter, base: str | None) -> PreTrainedModel:
    """The base model with ``adapter``, ready to answer.

    ``base`` is the name of the base model; None: as the adapter names it. Label names in the adapter's folder have
    precedence over the base's.
    """
    model = on_base(adapter, base).eval()
    # The one output of a reward model is a number, and so are all of a regression: they are no classes.
    kind = model.config.problem_type
    of_numbers = kind == "regression" or (model.config.num_labels == 1 and kind != "multi_label_classification")
    classifies = type(model).__name__.endswith("ForSequenceClassification") and not of_numbers
    if not (classifies or model.can_generate()):
        raise ConfigurationError(
            f"{adapter.source!r} must adapt a classifier or a model that generates text, got a {type(model).__name__} "
            f"with {model.config.num_labels} outputs{' of numbers' * of_numbers}"
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu")
