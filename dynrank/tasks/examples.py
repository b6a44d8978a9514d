"""Making a language model's training examples from rows: prompts with answers, chats or texts."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import datasets

from dynrank.tasks.chats import tokens_of_chat

_IDS, _FLAGS = datasets.Sequence(datasets.Value("int32")), datasets.Sequence(datasets.Value("bool"))
_NUMBER, _TEXT = datasets.Value("int32"), datasets.Value("string")
# learned: a flag for each token. lengths: tokens of each example in a packed row. prompt_length: 0 without a prompt.
FEATURES = datasets.Features(
    {"input_ids": _IDS, "learned": _FLAGS, "lengths": _IDS, "length": _NUMBER, "cut": _NUMBER}
    | {"prompt": _TEXT, "answer": _TEXT, "prompt_length": _NUMBER}
)


class Example(NamedTuple):
    """Tokens, a flag for each whether it is learned, and whether the rest of its text is in later examples.

    If there is a prompt, its text, the answer's text and the number of the prompt's tokens are included.
    """

    ids: list[int]
    learned: list[bool]
    prompt: str = ""
    answer: str = ""
    prompt_length: int = 0
    cut: bool = False


def make_examples(
    rows: Mapping[str, list[Any]], *, tokenizer: Any, form: str, max_length: int, packed: bool, texts: bool
) -> dict[str, list[Any]]:
    """Columns of :data:`FEATURES` for a batch of rows; examples with more than ``max_length`` tokens are left out.

    If ``packed``, several examples share a row of up to ``max_length`` tokens. ``texts``: whether to keep the texts of
    prompts and answers.
    """
    made: dict[str, list[Any]] = {name: [] for name in FEATURES}
    fitting = [example for example in _OF[form](rows, tokenizer, max_length) if len(example.ids) <= max_length]
    for row in pack(fitting, max_length) if packed else [[example] for example in fitting]:
        lengths = [len(example.ids) for example in row]
        ids, learned = [i for e in row for i in e.ids], [own for e in row for own in e.learned]
        kept = (row[0].prompt, row[0].answer) if texts else ("", "")
        cut = sum(example.cut for example in row)
        values = (ids, learned, lengths, sum(lengths), cut, *kept, row[0].prompt_length)
        for name, value in zip(FEATURES, values, strict=True):
            made[name].append(value)
    return made


def _of_completions(rows: Mapping[str, list[str]], tokenizer: Any, max_length: int) -> Iterator[Example]:
    prompts = tokenizer(rows["prompt"])["input_ids"]
    answers = tokenizer(rows["answer"], add_special_tokens=False)["input_ids"]
    for text, wanted, prompt, answer in zip(rows["prompt"], rows["answer"], prompts, answers, strict=True):
        learned = [False] * len(prompt) + [True] * (len(answer) + 1)
        yield Example([*prompt, *answer, tokenizer.eos_token_id], learned, text, wanted, len(prompt))


def _of_chats(rows: Mapping[str, list[Any]], tokenizer: Any, max_length: int) -> Iterator[Example]:
    for messages in rows["messages"]:
        ids, learned = tokens_of_chat(tokenizer, messages)
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        end = len(learned) - learned[::-1].index(True)
        prompt_length = end - learned[:end][::-1].index(False)
        yield Example(ids, learned, messages[last - 1]["content"], messages[last]["content"], prompt_length)


def _of_texts(rows: Mapping[str, list[str]], tokenizer: Any, max_length: int) -> Iterator[Example]:
    for ids in tokenizer(rows["text"])["input_ids"]:
        whole = [*ids, tokenizer.eos_token_id]
        # A longer text is cut into several examples.
        for start in range(0, len(whole), max_length):
            piece = whole[start : start + max_length]
            yield Example(piece, [True] * len(piece), cut=start == 0 and len(whole) > max_length)


def pack(examples: Iterable[Example], length: int) -> list[list[Example]]:
    """Rows of up to ``length`` tokens with the examples, each of up to ``length`` tokens, in their order."""
    rows: list[list[Example]] = []
    room = -1
    for example in examples:
        if len(example.ids) > room:
            rows.append([])
            room = length
        rows[-1].append(example)
        room -= len(example.ids)
    return rows


_OF = {"completion": _of_completions, "chat": _of_chats, "text": _of_texts}
