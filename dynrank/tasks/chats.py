"""Finding the assistant's tokens in a chat, by the marks of the tokenizer's template or by prefixes of its text."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from dynrank.errors import ConfigurationError, shown

# The mark by which transformers finds the assistant's tokens.
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


def check_template(tokenizer: Any, model: str) -> None:
    """Refuse a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        raise ConfigurationError(f"the tokenizer of task.model={model} has no chat template; set task.model")


def tokens_of_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], list[bool]]:
    """The tokens of a chat in the template's format, and for each token whether it is learned (the assistant's turns).

    A template with ``{% generation %}`` marks these turns. With another template, a turn is the text that it adds to
    the earlier chat with the prompt for an answer.
    """
    turns = [dict(message) for message in messages]
    try:
        if _MARKED.search(str(tokenizer.chat_template)):
            options = {"return_dict": True, "return_assistant_tokens_mask": True}
            made = tokenizer.apply_chat_template(turns, **options)
            return made["input_ids"], [bool(own) for own in made["assistant_masks"]]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        places = [_place(tokenizer, turns, i, text) for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    except TemplateError as error:
        raise ConfigurationError(
            f"the chat template refuses {shown(turns)}: {error}; correct this chat, or set data"
        ) from error
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in made["offset_mapping"]]
    return made["input_ids"], [any(first <= start < end for first, end in places) for start in starts]


def _place(tokenizer: Any, turns: list[dict[str, str]], i: int, text: str) -> tuple[int, int]:
    """(start, end) of turn ``i`` in ``text``, the whole chat."""
    before = tokenizer.apply_chat_template(turns[:i], tokenize=False, add_generation_prompt=True)
    after = tokenizer.apply_chat_template(turns[: i + 1], tokenize=False)
    if not (after.startswith(before) and text.startswith(after)):
        raise ConfigurationError(
            f"the chat template changes turn {i + 1} of {shown(turns)} when later turns follow, so the turn's tokens "
            "are unknown; set task.model to one whose template has {% generation %}"
        )
    return len(before), len(after)
