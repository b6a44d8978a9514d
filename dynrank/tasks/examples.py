"""A language model's training examples from rows: prompts with answers, chats or texts, alone or packed in a row."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import torch
from jinja2 import TemplateError
from torch import Tensor, nn

from dynrank.errors import ConfigurationError, shown

_IDS = datasets.Sequence(datasets.Value("int32"))
_FLAGS = datasets.Sequence(datasets.Value("bool"))
_NUMBER = datasets.Value("int32")
_TEXT = datasets.Value("string")
# learned: a flag for each token. lengths: tokens of each example in a packed row. prompt_length: 0 without a prompt.
FEATURES = datasets.Features(
    {"input_ids": _IDS, "learned": _FLAGS, "lengths": _IDS, "length": _NUMBER, "cut": _NUMBER}
    | {"prompt": _TEXT, "answer": _TEXT, "prompt_length": _NUMBER}
)
# The mark by which transformers finds the assistant's tokens.
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


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
        ids = [i for e in row for i in e.ids]
        learned = [own for e in row for own in e.learned]
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


def positions(lengths: Iterable[int]) -> Tensor:
    """0, 1, ... for each example of a row."""
    return torch.cat([torch.arange(length) for length in lengths])


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Refuse a model in which an example attends to another example of its row; two forwards test this.

    In transformers, positions that start again mark a new example, but not every model's attention uses that.
    """
    tokens = torch.arange(1, 9, device=next(model.parameters()).device)
    # The two rows have only their second example in common.
    rows = torch.stack([tokens, torch.cat([tokens[4:], tokens[4:]])])
    training = model.training
    places = positions([4, 4]).to(tokens.device).expand(2, 8)
    try:
        first, second = model.eval()(input_ids=rows, position_ids=places, use_cache=False).logits[:, 4:].float()
    # This error means that the model takes no position_ids.
    except TypeError:
        first = tokens[:1]
        second = tokens[1:2]
    finally:
        model.train(training)
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-3 * float(first.abs().max())):
        config: Any = model.config
        raise ConfigurationError(
            f"{type(model).__name__} with model.attention={config._attn_implementation} attends to the other "
            "examples of a packed row; set task.packed=false"
        )


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


_OF = {"completion": _of_completions, "chat": _of_chats, "text": _of_texts}
