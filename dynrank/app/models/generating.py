"""Answers that a language model generates greedily, and the tokens that end them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import GenerationConfig

from dynrank.errors import ConfigurationError, shown

_ANSWER = "An answer of the assistant."
_WORD = "x"


def closing_tokens(tokenizer: Any) -> int:
    """How many tokens the tokenizer puts behind a text, such as its end (``add_eos_token=True``).

    What goes on after a text, as the answer to a prompt does, must not have them before it.
    """
    word = tokenizer(_WORD, add_special_tokens=False)["input_ids"]
    whole = tokenizer(_WORD)["input_ids"]
    starts = [i for i in range(len(whole)) if word and whole[i : i + len(word)] == word]
    return len(whole) - starts[0] - len(word) if starts else 0


@torch.no_grad()
def greedy_texts(
    model: Any,
    tokenizer: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    max_new_tokens: int,
    *,
    end_of_turn: str | None = None,
    is_turn: bool = False,
    synced: bool = False,
) -> list[str]:
    """The most probable token again and again after each prompt, up to an end or ``max_new_tokens``, as texts.

    Beams, penalties and whatever else the base's files say of generation are left out.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        input_ids: int64 (batch, length), padded on the left.
        attention_mask: (batch, length).
        max_new_tokens: the largest number of tokens of an answer.
        end_of_turn: a token that also ends an answer, see :func:`end_of_turn_of`.
        is_turn: whether the texts are turns of chats, before which a template puts what it likes; others go on from
            the prompt, with the blank before their first word.
        synced: whether all processes need the same number of forwards.
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
    return [_answer_text(tokenizer, ids.tolist(), input_ids.shape[1], is_turn) for ids in made]


def _answer_text(tokenizer: Any, ids: list[int], start: int, is_turn: bool) -> str:
    """The text of the tokens from ``start`` on, which go on from those before, with the blanks around it."""
    prompt, answer, whole = tokenizer.batch_decode([ids[:start], ids[start:], ids], skip_special_tokens=True)
    # Some tokenizers take the blank before the first word of a text away, and here it is not the first.
    found: str = whole[len(prompt) :] if whole.startswith(prompt) and not is_turn else answer
    return found


def end_tokens(model: Any, tokenizer: Any, end_of_turn: str | None = None) -> list[int] | None:
    """The tokens that end an answer: the tokenizer's end, the model's own, and ``end_of_turn`` in chats."""
    own = model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    if end_of_turn is not None:
        found.add(tokenizer.convert_tokens_to_ids(end_of_turn))
    return sorted(found) or None


def end_of_turn_of(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str | None:
    """The special token by which the chat template ends an answer to the first question of ``messages``.

    Training on chats learns it as the end. It need not be the tokenizer's end, nor one that the model's files name:
    ``<|im_end|>`` in many base models that have a template for chats. None if no special token follows an answer.
    """
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), len(messages) - 1)
    text = rendered(tokenizer, [*messages[: first + 1], {"role": "assistant", "content": _ANSWER}])
    _, answer, after = text.rpartition(_ANSWER)
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special.update(tokenizer.all_special_tokens)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(after, add_special_tokens=False)["input_ids"])
    return next((token for token in tokens if token in special), None) if answer else None


def rendered(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """A chat in the format of the tokenizer's template."""
    try:
        text: str = tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False)
    except TemplateError as error:
        raise ConfigurationError(f"the chat template refuses {shown([*messages])}: {error}; correct it") from error
    return text
