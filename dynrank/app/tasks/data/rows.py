"""One row of users' data in the columns of a form, and what is wrong with it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import Any

import datasets

from dynrank.app.tasks.data.columns import COLUMNS, KEYS_OF_A_TURN, SNIFFED, Columns, Theirs
from dynrank.errors import shown

# A row with its number, from 1 on, or the number with a text that says why there is no row.
Numbered = tuple[int, Mapping[str, Any] | str]
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
# Turns of the assistant that call a tool: ShareGPT's, as LLaMA-Factory and others write them.
_CALLS = {"function_call", "tool_call"}
_TEXT = datasets.Value("string")


def features_of(columns: Columns) -> datasets.Features:
    """The types of the columns that :func:`checked_rows` makes."""
    made: dict[str, Any] = dict.fromkeys(COLUMNS[columns.form], _TEXT)
    if columns.form == "chat":
        made["messages"] = datasets.List({"role": _TEXT, "content": _TEXT})
    if columns.several:
        made["label"] = datasets.List(_TEXT)
    if "label" in made:
        made["trimmed"] = datasets.Value("bool")
    return datasets.Features(
        {**made, "digest": datasets.Value("int64"), "place": datasets.Value("int64"), "fault": _TEXT}
    )


def checked_rows(rows: Iterable[Numbered], columns: Columns) -> Iterator[dict[str, Any]]:
    """Our columns of each row; also the digest of its text, its place (the number) and its fault, or None.

    Blanks around a label are left out; ``trimmed`` says whether there were any.
    """
    names = [*features_of(columns)]
    for number, row in rows:
        found: Any = row
        if not isinstance(row, str):
            found = _late(row, columns) or _READ[columns.form](_renamed(row, columns), columns)
        values: Mapping[str, Any] = {"fault": found} if isinstance(found, str) else found
        text = str(values.get(COLUMNS[columns.form][0]))
        digest = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), signed=True)
        yield {name: values.get(name) for name in names} | {"digest": digest, "place": number}


def _late(row: Mapping[str, Any], columns: Columns) -> str:
    """What is wrong with a row that has an optional column, which the first rows lack; "" if nothing is."""
    late = [name for name in row if row[name] and str(name).lower() in columns.late] if columns.late else []
    lack = f"which the first {SNIFFED:,} rows lack: write it into the first row, too, as an empty text if need be"
    return f"has a column {late[0]!r}, {lack}" if late else ""


def _renamed(row: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    named = {ours: _joined(row, theirs) for ours, theirs in columns.names.items()}
    if columns.classes is not None and named["label"] is not None:
        label = named["label"]
        names = columns.classes
        named["label"] = [names[i] for i in label] if isinstance(label, list | tuple) else names[label]
    return named


def _joined(row: Mapping[str, Any], theirs: Theirs) -> Any:
    """The value of a column, or of several: their texts that are not empty, each in a new line."""
    if isinstance(theirs, str):
        return row.get(theirs)
    filled = [row[name] for name in theirs if row.get(name) is not None]
    strange = [value for value in filled if not isinstance(value, str)]
    return strange[0] if strange else "\n".join(text for text in filled if text.strip())


def _fault(value: Any, name: str) -> str:
    """What is wrong with a text; "" if nothing is."""
    if value is None:
        return f"has no {name}"
    if not isinstance(value, str):
        return f"must have a text as its {name}, got {shown(value)}"
    if not value.strip():
        return f"has an empty {name}"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"is not UTF-8 in its {name}: {shown(value)}"
    return ""


def _classified(row: dict[str, Any], columns: Columns) -> dict[str, Any] | str:
    fault = _fault(row["text"], "text")
    if columns.asked:
        return fault or row
    label = row["label"]
    if label is None or label == "":
        return "has no label"
    labels = [*label] if isinstance(label, list | tuple) else [label]
    if any(not isinstance(one, str | int) and not (isinstance(one, float) and one.is_integer()) for one in labels):
        return f"must have texts or ints as labels, got {shown(label)}"
    if isinstance(label, list | tuple) and not columns.several:
        return f"must have one label, as the first rows have, got {shown(label)}"
    # A column of ints in which some are missing has floats.
    written = [str(int(one)) if isinstance(one, float) else str(one) for one in labels]
    stripped = [name.strip() for name in written]
    # A row counts once for each of its labels.
    names = [*dict.fromkeys(stripped)]
    fault = fault or next(filter(None, (_fault(name, "label") for name in names)), "")
    return fault or {**row, "label": names if columns.several else names[0], "trimmed": stripped != written}


def _completed(row: dict[str, Any], columns: Columns) -> dict[str, Any] | str:
    fault = _fault(row["prompt"], "prompt") or ("" if columns.asked else _fault(row["answer"], "answer"))
    if fault or not row.get("input"):
        return fault or row
    # In Alpaca's format, the prompt is an instruction about this input.
    return _fault(row["input"], "input") or {**row, "prompt": f"{row['prompt']}\n{row['input']}"}


def _chatted(row: dict[str, Any], columns: Columns) -> dict[str, Any] | str:
    turns = row.get("messages")
    if "prompt" in row:
        made: Any = _completed(row, columns) if isinstance(row["prompt"], str) else row
        if isinstance(made, str):
            return made
        # In TRL's format, prompt and answer are lists of turns.
        if made.get("input") and isinstance(made["prompt"], list):
            fault = _fault(made["input"], "input")
            if fault:
                return fault
            made = _with_input(made)
        parts = [("user", made["prompt"]), *([] if columns.asked else [("assistant", made["answer"])])]
        turns = [turn for role, part in parts for turn in (part if isinstance(part, list) else [_turn(role, part)])]
    if not isinstance(turns, list | tuple) or not turns:
        return "has no messages"
    messages = [_turn("system", row["system"])] if row.get("system") else []
    for turn in turns:
        pairs = [pair for pair in KEYS_OF_A_TURN if isinstance(turn, Mapping) and isinstance(turn.get(pair[0]), str)]
        if not pairs:
            return f"must have messages with a role and a content, or from and value, got {shown(turn)}"
        role = turn[pairs[0][0]].lower()
        if role in _CALLS or (turn.get("tool_calls") and not turn.get(pairs[0][1])):
            return "has tool calls, which are not learned"
        messages.append(_turn(_ROLES.get(role, role), turn.get(pairs[0][1])))
    # The prompt that stands in the chat is its own.
    if row.get("system") and messages[1]["role"] == "system":
        del messages[0]
    # A question ends before the answer.
    while columns.asked and messages and messages[-1]["role"] == "assistant":
        messages.pop()
    for message in messages:
        fault = _fault(message["content"], "content")
        if fault:
            return f"has a message of the {message['role']} that {fault}"
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if roles[:1] != ["user"]:
        return f"is a chat that starts with the {roles[0] if roles else 'system'}, not with the user"
    return (
        {"messages": messages} if columns.asked or "assistant" in roles else "is a chat without a turn of the assistant"
    )


def _with_input(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its input in a new line of the prompt's last turn, as :func:`_completed` adds it to a text."""
    *before, last = row["prompt"] or [{}]
    key = next((key for _, key in KEYS_OF_A_TURN if isinstance(last, Mapping) and isinstance(last.get(key), str)), None)
    return row if key is None else {**row, "prompt": [*before, {**last, key: f"{last[key]}\n{row['input']}"}]}


def _turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


_READ: dict[str, Callable[[dict[str, Any], Columns], dict[str, Any] | str]] = {
    "classification": _classified,
    "completion": _completed,
    "chat": _chatted,
    "text": lambda row, columns: _fault(row["text"], "text") or row,
}
