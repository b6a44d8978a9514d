"""A language model's training examples from rows: prompts with answers, chats, or texts."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import datasets
from jinja2 import TemplateError

from dynrank.app.models.generating import closing_tokens
from dynrank.errors import ConfigurationError, shown

_IDS = datasets.Sequence(datasets.Value("int32"))
_FLAGS = datasets.Sequence(datasets.Value("bool"))
_NUMBER = datasets.Value("int32")
_TEXT = datasets.Value("string")
# learned: a flag for each token. prompt_length: 0 without a prompt.
FEATURES = datasets.Features(
    {"input_ids": _IDS, "learned": _FLAGS, "length": _NUMBER, "cut": _NUMBER}
    | {"prompt": _TEXT, "answer": _TEXT, "prompt_length": _NUMBER, "opening": _TEXT}
)
# A word by which it is seen whether a tokenizer puts a blank before a text.
_WORD = "x"
# The mark by which transformers finds the assistant's tokens.
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Example(NamedTuple):
    """Tokens, a flag for each whether it is learned, and whether a text that was too long begins with them.

    If there is a prompt, its text, the answer's text and the number of the prompt's tokens are included, and the
    ``opening``: what a chat template puts before the answer into the turn that is learned, as an empty block of
    thoughts.
    """

    input_ids: list[int]
    learned: list[bool]
    prompt: str = ""
    answer: str = ""
    prompt_length: int = 0
    opening: str = ""
    cut: bool = False


def make_examples(
    rows: Mapping[str, list[Any]], *, tokenizer: Any, max_length: int, form: str, packed: bool
) -> dict[str, list[Any]]:
    """Columns of :data:`FEATURES` for a batch of rows; examples with more than ``max_length`` tokens are left out.

    If ``packed``, texts are one stream of tokens that is cut into examples, as in transformers' run_clm.
    """
    made: dict[str, list[Any]] = {name: [] for name in FEATURES}
    found = _of_texts(rows, tokenizer, max_length, packed) if form == "text" else _OF[form](rows, tokenizer)
    for example in found:
        row = {**example._asdict(), "length": len(example.input_ids)}
        # A single token has none before it that could predict it.
        if 1 < row["length"] <= max_length:
            for name in FEATURES:
                made[name].append(row[name])
    return made


def _of_completions(rows: Mapping[str, list[str]], tokenizer: Any) -> Iterator[Example]:
    prompts = _open(rows["prompt"], tokenizer)
    answers = _continuing(rows["answer"], tokenizer)
    for text, wanted, prompt, answer in zip(rows["prompt"], rows["answer"], prompts, answers, strict=True):
        learned = [False] * len(prompt) + [True] * (len(answer) + 1)
        yield Example([*prompt, *answer, tokenizer.eos_token_id], learned, text, wanted, len(prompt))


def _open(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The tokens of texts that something goes on after: without an end that the tokenizer puts behind each."""
    closing = closing_tokens(tokenizer)
    return [ids[: len(ids) - closing] for ids in tokenizer([*texts])["input_ids"]]


def _continuing(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The tokens of texts that go on after another text.

    Some tokenizers (Llama 2, Mistral) put a blank before the first word of a text. Here a line break stands before it,
    whose tokens are taken away again.
    """
    alone: list[list[int]] = tokenizer([*texts], add_special_tokens=False)["input_ids"]
    word = tokenizer(_WORD, add_special_tokens=False)["input_ids"]
    if tokenizer.decode(word + word) == _WORD + _WORD:
        return alone
    line = tokenizer("\n", add_special_tokens=False)["input_ids"]
    after = tokenizer([f"\n{text}" for text in texts], add_special_tokens=False)["input_ids"]
    pairs = zip(alone, after, strict=True)
    return [ids[len(line) :] if line and ids[: len(line)] == line else own for own, ids in pairs]


def _of_chats(rows: Mapping[str, list[Any]], tokenizer: Any) -> Iterator[Example]:
    for messages in rows["messages"]:
        ids, learned = tokens_of_chat(tokenizer, messages)
        if len({*learned}) == 1:
            raise ConfigurationError(f"the chat template drops whole turns of {shown(messages)}; set task.model")
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        end = len(learned) - learned[::-1].index(True)
        prompt_length = end - learned[:end][::-1].index(False)
        prompt, answer = (messages[i]["content"] for i in (last - 1, last))
        opening = _opening(tokenizer.decode(ids[prompt_length:end], skip_special_tokens=True), answer)
        yield Example(ids, learned, prompt, answer, prompt_length, opening)


def _opening(turn: str, answer: str) -> str:
    """What stands before ``answer`` in the text of its turn; "" if that is blank, or the answer is not in the turn."""
    text = answer.strip()
    before = turn[: turn.rfind(text)] if text and text in turn else ""
    return before if before.strip() else ""


def _of_texts(rows: Mapping[str, list[str]], tokenizer: Any, max_length: int, packed: bool) -> Iterator[Example]:
    texts = [[*ids, tokenizer.eos_token_id] for ids in _open(rows["text"], tokenizer)]
    for whole in [[*chain(*texts)]] if packed else texts:
        for start in range(0, len(whole), max_length):
            piece = whole[start : start + max_length]
            is_cut = not packed and start == 0 and len(whole) > max_length
            yield Example(piece, [True] * len(piece), cut=is_cut)


def check_template(tokenizer: Any, model: str) -> None:
    """Refuse a tokenizer without a chat template, or one that does not say where in a chat its tokens stand."""
    if not tokenizer.chat_template or not tokenizer.is_fast:
        fault = "is in Python and says no places of tokens" if tokenizer.chat_template else "has no chat template"
        raise ConfigurationError(f"the tokenizer of task.model={model} {fault}; set task.model")


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
    ids, offsets = _tokens_with_places(tokenizer, text)
    last, end = places[-1]
    if any(start < last < stop for start, stop in offsets):
        # A token would contain the end of the prompt (a blank) and the begin of the answer. Who asks has the prompt
        # alone, in which the earlier answers are one text with the rest.
        ids, offsets = _tokens_with_places(tokenizer, text[:last])
        for start, stop in ((last, end), (end, len(text))):
            own = _continuing([text[start:stop]], tokenizer)[0]
            ids += own
            offsets += [(start, stop)] * len(own)
    # A token that contains the begin of an earlier answer is learned, too. Some tokens have no characters.
    return ids, [any(start < end and first < max(stop, start + 1) for first, end in places) for start, stop in offsets]


def _tokens_with_places(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """The tokens of ``text``, and for each its (start, end) in it."""
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return made["input_ids"], made["offset_mapping"]


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


_OF = {"completion": _of_completions, "chat": _of_chats}
