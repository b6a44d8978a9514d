"""Answers that a language model generates greedily, and the tokens that end them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import GenerationConfig

from dynrank.errors import ConfigurationError, shown

_ANSWER = "An answer of the assistant."
_CHAT = ({"role": "user", "content": "A question."}, {"role": "assistant", "content": _ANSWER})
_WORD = "x"


def open_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of texts, without those that the tokenizer puts behind each, as an end (``add_eos_token=True``).

    What goes on after a text, as the answer to a prompt does, must not have them before it.
    """
    word = tokenizer(_WORD, add_special_tokens=False)["input_ids"]
    whole = tokenizer(_WORD)["input_ids"]
    starts = [i for i in range(len(whole)) if word and whole[i : i + len(word)] == word]
    closing = len(whole) - starts[0] - len(word) if starts else 0
    return [ids[: len(ids) - closing] for ids in tokenizer([*texts])["input_ids"]]


@torch.no_grad()
def greedy_texts(
    model: Any,
    tokenizer: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    max_new_tokens: int,
    *,
    end_of_turn: str | None = None,
    synced: bool = False,
) -> list[str]:
    """The most probable token again and again after each prompt, up to an end or ``max_new_tokens``, as texts.

    Beams, penalties and whatever else the base's files say of generation are left out. ``input_ids``, int64 (batch,
    length), are padded on the left. ``end_of_turn`` is a token that also ends an answer, see :func:`end_of_turn_of`;
    ``synced``: all processes need the same number of forwards.
    """
    ends = end_tokens(model, tokenizer, end_of_turn)
    of_base = model.generation_config
    # What generate is not given, it takes from the model's settings, also if it gets settings as a whole.
    model.generation_config = GenerationConfig()
    try:
        made = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
            synced_gpus=synced,
        )
    finally:
        model.generation_config = of_base
    cuts = (input_ids, made[:, input_ids.shape[1] :], made)
    texts = zip(*(tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in cuts), strict=True)
    # Some tokenizers take the blank before the first word of a text away, and here it is not the first.
    return [whole[len(prompt) :] if whole.startswith(prompt) else answer for prompt, answer, whole in texts]


def end_tokens(model: Any, tokenizer: Any, end_of_turn: str | None = None) -> list[int] | None:
    """The tokens that end an answer: the tokenizer's end, the model's own, and ``end_of_turn`` in chats."""
    own = model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    if end_of_turn is not None:
        found.add(tokenizer.convert_tokens_to_ids(end_of_turn))
    return sorted(found) or None


def end_of_turn_of(tokenizer: Any) -> str | None:
    """The special token by which the chat template ends an answer; None if no special token follows an answer.

    Training on chats learns it as the end. It need not be the tokenizer's end, nor one that the model's files name:
    ``<|im_end|>`` in many base models that have a template for chats.
    """
    _, answer, after = rendered(tokenizer, _CHAT).rpartition(_ANSWER)
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special.update(tokenizer.all_special_tokens)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(after, add_special_tokens=False)["input_ids"])
    return next((token for token in tokens if token in special), None) if answer else None


def rendered(tokenizer: Any, messages: Sequence[Mapping[str, str]], *, asked: bool = False) -> str:
    """A chat in the format of the tokenizer's template; if it is ``asked``, with the beginning of the next answer."""
    turns = [dict(message) for message in messages]
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asked)
    # transformers has a ValueError for a tokenizer without a template.
    except (TemplateError, ValueError) as error:
        raise ConfigurationError(f"the chat template refuses {shown(turns)}: {error}; correct it") from error
    return text
