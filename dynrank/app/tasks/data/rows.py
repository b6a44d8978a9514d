"""One row of users' data in the columns of a form, and what is wrong with it."""

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import datasets

from dynrank.app.tasks.data.columns import COLUMNS, Columns, Theirs
from dynrank.errors import shown

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
_KEYS_OF_A_TURN = (("role", "content"), ("from", "value"))
# Turns of the assistant that call a tool: ShareGPT's, as LLaMA-Factory and others write them.
_CALLS = {"function_call", "tool_call"}
_TEXT = datasets.Value("string")


class UnusableRow(ValueError):
    """What is wrong with a row, as a sentence that goes on after its number."""


def features_of(columns: Columns) -> datasets.Features:
    """The types of the columns that :func:`checked_rows` makes."""
    made: dict[str, Any] = dict.fromkeys(COLUMNS[columns.form], _TEXT)
    if columns.form == "chat":
        made["messages"] = datasets.List({"role": _TEXT, "content": _TEXT})
    if columns.several:
        made["label"] = datasets.List(_TEXT)
    number = datasets.Value("int64")
    return datasets.Features({**made, "trimmed": number, "digest": number, "place": number, "fault": _TEXT})


def checked_rows(
    batch: Mapping[str, list[Any]],
    indices: Sequence[int],
    *,
    columns: Columns,
    first: int,
    classes: Sequence[str] | None,
) -> dict[str, list[Any]]:
    """Our columns of a batch of rows; also the digest, the place and the fault of each.

    Args:
        batch: the user's columns.
        indices: the indices of the rows.
        columns: how the user's columns are read.
        first: the place of the row with the index 0.
        classes: names of the labels, if ``datasets`` stores the labels as numbers, of which -1 is none.

    Returns:
        the columns of the form; ``trimmed``, 1 if there were blanks around a label, which are left out; ``digest``, the
        same number for the same text; ``place``; and ``fault``, None or what is wrong with the row.
    """
    rows = (dict(zip(batch, cells, strict=True)) for cells in zip(*batch.values(), strict=True))
    made = [_checked(row, columns, classes) | {"place": first + i} for i, row in zip(indices, rows, strict=True)]
    return {name: [row.get(name) for row in made] for name in features_of(columns)}


def _checked(row: Mapping[str, Any], columns: Columns, classes: Sequence[str] | None) -> dict[str, Any]:
    try:
        named = {ours: _joined(row, theirs) for ours, theirs in columns.names.items()}
        if classes is not None and named["label"] is not None:
            label = named["label"]
            named["label"] = [classes[i] for i in label] if isinstance(label, list) else [*classes, None][label]
        made = {"trimmed": 0, **_READ[columns.form](named, columns)}
    except UnusableRow as error:
        return {"trimmed": 0, "digest": 0, "fault": str(error)}
    text = str(made[COLUMNS[columns.form][0]])
    return {**made, "digest": int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), signed=True)}


def _joined(row: Mapping[str, Any], theirs: Theirs) -> Any:
    """The value of a column, or of several: their texts that are not empty, each in a new line."""
    if isinstance(theirs, str):
        return row.get(theirs)
    filled = [row[name] for name in theirs if row.get(name) is not None]
    strange = [value for value in filled if not isinstance(value, str)]
    return strange[0] if strange else "\n".join(text for text in filled if text.strip())


def _refuse_no_text(value: Any, name: str) -> None:
    """Refuse a value that is no text with letters."""
    if value is None:
        raise UnusableRow(f"has no {name}")
    if not isinstance(value, str):
        raise UnusableRow(f"must have a text as its {name}, got {shown(value)}")
    if not value.strip():
        raise UnusableRow(f"has an empty {name}")


def _classified(row: dict[str, Any], columns: Columns) -> dict[str, Any]:
    _refuse_no_text(row["text"], "text")
    if columns.asked:
        return row
    label = row["label"]
    if label is None or label == "":
        raise UnusableRow("has no label")
    labels = label if isinstance(label, list) else [label]
    if any(not isinstance(one, str | int) and not (isinstance(one, float) and one.is_integer()) for one in labels):
        raise UnusableRow(f"must have texts or ints as labels, got {shown(label)}")
    if isinstance(label, list) != columns.several:
        raise UnusableRow(f"must have {'a list of labels' if columns.several else 'one label'}, got {shown(label)}")
    # A column of ints in which some are missing has floats.
    written = [str(int(one)) if isinstance(one, float) else str(one) for one in labels]
    stripped = [name.strip() for name in written]
    for name in stripped:
        _refuse_no_text(name, "label")
    # A row counts once for each of its labels.
    names = [*dict.fromkeys(stripped)]
    return {**row, "label": names if columns.several else names[0], "trimmed": int(stripped != written)}


def _completed(row: dict[str, Any], columns: Columns) -> dict[str, Any]:
    for name in ("prompt",) if columns.asked else ("prompt", "answer"):
        _refuse_no_text(row[name], name)
    return {**row, "prompt": _with_input(row["prompt"], row)}


def _with_input(prompt: str, row: Mapping[str, Any]) -> str:
    """The prompt, and in a new line the row's input; in Alpaca's format the prompt is an instruction about it."""
    if not row.get("input"):
        return prompt
    _refuse_no_text(row["input"], "input")
    return f"{prompt}\n{row['input']}"


def _chatted(row: dict[str, Any], columns: Columns) -> dict[str, Any]:
    found = [_turn(turn) for turn in _turns(row, columns)]
    # The system prompt that stands in the chat is its own.
    if row.get("system") and found[0]["role"] != "system":
        found.insert(0, {"role": "system", "content": row["system"]})
    # A question ends before the answer.
    while columns.asked and found and found[-1]["role"] == "assistant":
        found.pop()
    for message in found:
        try:
            _refuse_no_text(message["content"], "content")
        except UnusableRow as fault:
            raise UnusableRow(f"has a message of the {message['role']} that {fault}") from None
    roles = [message["role"] for message in found if message["role"] != "system"]
    if roles[:1] != ["user"]:
        raise UnusableRow(f"is a chat that starts with the {roles[0] if roles else 'system'}, not with the user")
    if not columns.asked and "assistant" not in roles:
        raise UnusableRow("is a chat without a turn of the assistant")
    return {"messages": found}


def _turns(row: dict[str, Any], columns: Columns) -> Sequence[Any]:
    """The turns of a row with messages, or with a prompt and an answer, which are texts or, as TRL has them, turns."""
    turns: Any = row.get("messages")
    if isinstance(row.get("prompt"), list):
        *before, last = map(_turn, row["prompt"] or [{}])
        turns = [*before, {**last, "content": _with_input(last["content"], row)}]
    elif "prompt" in row:
        turns = [{"role": "user", "content": _completed(row, columns)["prompt"]}]
    if "prompt" in row and not columns.asked:
        answer = row["answer"]
        turns = [*turns, *(answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}])]
    if not isinstance(turns, list) or not turns:
        raise UnusableRow("has no messages")
    return turns


def _turn(turn: Any) -> dict[str, Any]:
    """A turn of a chat with our names of roles."""
    pairs = [pair for pair in _KEYS_OF_A_TURN if isinstance(turn, Mapping) and isinstance(turn.get(pair[0]), str)]
    if not pairs:
        raise UnusableRow(f"must have messages with a role and a content, or from and value, got {shown(turn)}")
    role, content = (turn.get(key) for key in pairs[0])
    if role.lower() in _CALLS or (turn.get("tool_calls") and not content):
        raise UnusableRow("has tool calls, which are not learned")
    return {"role": _ROLES.get(role.lower(), role.lower()), "content": content}


def _plain(row: dict[str, Any], columns: Columns) -> dict[str, Any]:
    _refuse_no_text(row["text"], "text")
    return row


_READ: dict[str, Callable[[dict[str, Any], Columns], dict[str, Any]]] = {
    "classification": _classified,
    "completion": _completed,
    "chat": _chatted,
    "text": _plain,
}
