"""A language model's training examples from rows: prompts with answers, and chats, as TRL makes them; texts."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from os.path import commonprefix
from typing import Any

import datasets
from jinja2 import TemplateError

from dynrank.app.models.generating import open_ids
from dynrank.errors import ConfigurationError, shown

_NUMBER = datasets.Value("int32")
_IDS = datasets.List(_NUMBER)
# ``learned`` has a flag for each token. If there is a prompt, ``asked`` are its tokens as they are asked, ``answer`` is
# the text of the answer, and ``prompt_length`` the number of the tokens before it. The text of a chat's answer is what
# is learned of its turn, with what the template puts there.
FEATURES = datasets.Features(
    {"input_ids": _IDS, "learned": datasets.List(datasets.Value("bool")), "length": _NUMBER}
    | {"asked": _IDS, "answer": datasets.Value("string"), "prompt_length": _NUMBER}
)
# The mark by which transformers finds the assistant's tokens.
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


def make_examples(
    rows: Mapping[str, list[Any]], *, tokenizer: Any, max_length: int, form: str, packed: bool
) -> dict[str, list[Any]]:
    """Columns of :data:`FEATURES` for a batch of rows; examples with more than ``max_length`` tokens are left out.

    If ``packed``, texts are one stream of tokens that is cut into examples, as in transformers' run_clm.
    """
    made: dict[str, list[Any]] = {name: [] for name in FEATURES}
    if form == "text":
        found = _of_texts(rows["text"], tokenizer, max_length, packed)
    elif form == "completion":
        found = _of_completions(rows, tokenizer)
    else:
        found = (_of_chat(messages, tokenizer) for messages in rows["messages"])
    for example in found:
        length = len(example["input_ids"])
        # A single token has none before it that could predict it.
        if 1 < length <= max_length:
            for name, value in {**example, "length": length}.items():
                made[name].append(value)
    return made


def _example(
    ids: list[int], learned: list[bool], asked: Sequence[int] = (), answer: str = "", prompt_length: int = 0
) -> dict[str, Any]:
    return {"input_ids": ids, "learned": learned, "asked": asked, "answer": answer, "prompt_length": prompt_length}


def _of_completions(rows: Mapping[str, list[str]], tokenizer: Any) -> Iterator[dict[str, Any]]:
    end = tokenizer.eos_token
    pairs = [*zip(rows["prompt"], rows["answer"], strict=True)]
    wholes = [prompt + answer + ("" if answer.endswith(end) else end) for prompt, answer in pairs]
    ids = zip(open_ids(tokenizer, rows["prompt"]), open_ids(tokenizer, wholes), strict=True)
    for (_, answer), (asked, whole) in zip(pairs, ids, strict=True):
        start = len(commonprefix([asked, whole]))
        yield _example(whole, _from(start, whole), asked, answer, start)


def _from(start: int, ids: Sequence[int]) -> list[bool]:
    """The flags of tokens that are learned from ``start`` on."""
    return [i >= start for i in range(len(ids))]


def _of_texts(rows: Sequence[str], tokenizer: Any, max_length: int, packed: bool) -> Iterator[dict[str, Any]]:
    texts = [[*ids, tokenizer.eos_token_id] for ids in open_ids(tokenizer, rows)]
    for whole in [[*chain(*texts)]] if packed else texts:
        for start in range(0, len(whole), max_length):
            piece = whole[start : start + max_length]
            yield _example(piece, _from(0, piece))


def _of_chat(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> dict[str, Any]:
    turns = [dict(message) for message in messages]
    last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    try:
        asked = tokenizer.apply_chat_template(turns[:last], add_generation_prompt=True)["input_ids"]
        ids, learned = _tokens_of_chat(tokenizer, turns, asked)
    except TemplateError as error:
        raise ConfigurationError(
            f"the chat template refuses {shown(turns)}: {error}; correct this chat, or set data"
        ) from error
    if True not in learned:
        raise ConfigurationError(
            f"the chat template marks no tokens of the assistant in {shown(turns)}: it may be missing the "
            "{% generation %} keyword, or drop whole turns; set task.model to another"
        )
    end = len(learned) - learned[::-1].index(True)
    start = end - (learned[:end][::-1].index(False) if False in learned[:end] else end)
    return _example(ids, learned, asked, tokenizer.decode(ids[start:end], skip_special_tokens=True), start)


def _tokens_of_chat(tokenizer: Any, turns: list[dict[str, str]], asked: list[int]) -> tuple[list[int], list[bool]]:
    """The tokens of a chat, and for each whether it is learned: the assistant's turns.

    As SFTTrainer has them with assistant_only_loss. Where a template has no marks and the only answer is the last turn,
    as it has them for a prompt, whose tokens are ``asked``, with a completion; this needs no marks.
    """
    template = None
    if not _MARKED.search(str(tokenizer.chat_template)):
        if [turn["role"] == "assistant" for turn in turns].index(True) == len(turns) - 1:
            ids = tokenizer.apply_chat_template(turns)["input_ids"]
            return ids, _from(len(commonprefix([asked, ids])), ids)
        template = _marked_template(tokenizer)
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    made = tokenizer.apply_chat_template(turns, chat_template=template, **options)
    return made["input_ids"], [bool(own) for own in made["assistant_masks"]]


def _marked_template(tokenizer: Any) -> str | None:
    """TRL's template with marks in place of the tokenizer's."""
    try:
        from trl.chat_template_utils import get_training_chat_template

        found: str | None = get_training_chat_template(tokenizer)
    except (ImportError, ValueError) as error:
        raise ConfigurationError(
            f"the chat template has no {{% generation %}} marks, and TRL gives none with them: {error}; pip install "
            "trl, set task.model to one whose template has them, or data to chats whose only answer is last"
        ) from error
    return found
