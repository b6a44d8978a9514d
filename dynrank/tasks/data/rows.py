"""Rows of users' data in the columns of a form, checked in the same pass; all faults are listed at once."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from dynrank.errors import ConfigurationError, shown
from dynrank.tasks.data.columns import COLUMNS, KEYS_OF_A_TURN, Columns

# The most faults that one message lists.
SHOWN = 20
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
_TEXT = datasets.Value("string")


def features_of(columns: Columns) -> datasets.Features:
    """The types of the columns that :func:`read_rows` makes."""
    made: dict[str, Any] = dict.fromkeys(COLUMNS[columns.form], _TEXT)
    if columns.form == "chat":
        made["messages"] = datasets.List({"role": _TEXT, "content": _TEXT})
    if "text_pair" in columns.names:
        made["text_pair"] = _TEXT
    if columns.several:
        made["label"] = datasets.List(_TEXT)
    return datasets.Features(
        {**made, "digest": datasets.Value("int64"), "place": datasets.Value("int64"), "fault": _TEXT}
    )


def read_rows(places: Iterable[int], rows: Iterable[Mapping[str, Any] | str], columns: Columns) -> dict[str, list[Any]]:
    """Our columns of the rows; also the digest of each row's text, its place (a line or a row) and its fault, or null.

    An element of ``rows`` that is a text says why there is no row.
    """
    made: dict[str, list[Any]] = {name: [] for name in features_of(columns)}
    for place, row in zip(places, rows, strict=True):
        found = row if isinstance(row, str) else _READ[columns.form](_renamed(row, columns), columns)
        values: Mapping[str, Any] = {"fault": found} if isinstance(found, str) else found
        text = str(values.get(COLUMNS[columns.form][0]))
        digest = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), signed=True)
        values = {**values, "digest": digest, "place": place}
        for name, column in made.items():
            column.append(values.get(name))
    return made


def check_rows(rows: datasets.Dataset, where: str, unit: str) -> datasets.Dataset:
    """The result of :func:`read_rows` without the column of faults, all of which one error lists.

    The error names the data as ``where``; ``unit`` is what places count, line or row.
    """
    if not len(rows):
        raise ConfigurationError(f"{where} has 0 rows; correct it")
    faults = column_of(rows, "fault")
    wrong = pc.indices_nonzero(pc.is_valid(faults))
    if len(wrong):
        places = column_of(rows, "place").take(wrong[:SHOWN]).to_pylist()
        pairs = zip(places, faults.take(wrong[:SHOWN]).to_pylist(), strict=True)
        refuse(where, [f"{unit} {place} {fault}" for place, fault in pairs], len(wrong), "correct")
    return rows.remove_columns("fault")


def check_labels(rows: datasets.Dataset, where: str, unit: str) -> None:
    """Refuse labels that only one row has: such a label is either not learned or not tested."""
    single = [label for label, count in counted(rows).items() if count == 1]
    if single:
        batch = rows.select_columns(["label", "place"]).with_format("arrow")[:]
        is_list = pa.types.is_list(batch["label"].type)
        labels = pc.list_flatten(batch["label"]) if is_list else batch["label"]
        places = batch["place"].take(pc.list_parent_indices(batch["label"])) if is_list else batch["place"]
        first = {label: places[pc.index(labels, label).as_py()].as_py() for label in single[:SHOWN]}
        said = [f"{unit} {place} alone has the label {label!r}" for label, place in first.items()]
        refuse(where, said, len(single), "add rows to, or remove,")


def refuse(where: str, said: Sequence[str], count: int, advice: str) -> None:
    """Raise one error about ``count`` faults of the data; ``said`` describes the first ones."""
    if count == 1:
        raise ConfigurationError(f"{where}: {said[0]}; {advice} it")
    more = [f"and {count - len(said):,} more"] if count > len(said) else []
    raise ConfigurationError("\n  ".join([f"{where}:", *said, *more]) + f"\n{advice} these {count:,}")


def column_of(rows: datasets.Dataset, name: str) -> pa.ChunkedArray:
    """A column of the rows as an Arrow array."""
    found: pa.ChunkedArray = rows.select_columns(name).with_format("arrow")[:][name]
    return found


def counted(rows: datasets.Dataset) -> dict[str, int]:
    """{label: number of its rows}, the most frequent first."""
    labels = column_of(rows, "label")
    if pa.types.is_list(labels.type):
        labels = pc.list_flatten(labels)
    counts = {pair["values"]: pair["counts"] for pair in pc.value_counts(labels).to_pylist()}
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def _renamed(row: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    named = {ours: row.get(theirs) for ours, theirs in columns.names.items()}
    if columns.classes is not None and named["label"] is not None:
        label = named["label"]
        names = columns.classes
        named["label"] = [names[i] for i in label] if isinstance(label, list | tuple) else names[label]
    return named


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
    label = row["label"]
    if label is None or label == "":
        return "has no label"
    labels = [*label] if isinstance(label, list | tuple) else [label]
    if any(not isinstance(one, str | int) and not (isinstance(one, float) and one.is_integer()) for one in labels):
        return f"must have texts or ints as labels, got {shown(label)}"
    if isinstance(label, list | tuple) and not columns.several:
        return f"must have one label, as the first rows have, got {shown(label)}"
    # A column of ints in which some are missing has floats.
    names = [str(int(one)) if isinstance(one, float) else str(one) for one in labels]
    faults = [_fault(row[name], name) for name in ("text", "text_pair") if name in row]
    fault = next(filter(None, [*faults, *(_fault(name, "label") for name in names)]), "")
    return fault or {**row, "label": names if columns.several else names[0]}


def _completed(row: dict[str, Any], columns: Columns) -> dict[str, Any] | str:
    fault = _fault(row["prompt"], "prompt") or _fault(row["answer"], "answer")
    if fault or not row.get("input"):
        return fault or row
    # In Alpaca's format, the prompt is an instruction about this input.
    return _fault(row["input"], "input") or {**row, "prompt": f"{row['prompt']}\n{row['input']}"}


def _chatted(row: dict[str, Any], columns: Columns) -> dict[str, Any] | str:
    turns = row.get("messages")
    if "prompt" in row:
        made = _completed(row, columns) if isinstance(row["prompt"], str) else row
        if isinstance(made, str):
            return made
        # In TRL's format, prompt and answer are lists of turns.
        parts = (("user", made["prompt"]), ("assistant", made["answer"]))
        turns = [turn for role, part in parts for turn in (part if isinstance(part, list) else [_turn(role, part)])]
    if not isinstance(turns, list | tuple) or not turns:
        return "has no messages"
    messages = [_turn("system", row["system"])] if row.get("system") else []
    for turn in turns:
        pairs = [pair for pair in KEYS_OF_A_TURN if isinstance(turn, Mapping) and isinstance(turn.get(pair[0]), str)]
        if not pairs:
            return f"must have messages with a role and a content, or from and value, got {shown(turn)}"
        role = turn[pairs[0][0]].lower()
        messages.append(_turn(_ROLES.get(role, role), turn.get(pairs[0][1])))
    for message in messages:
        fault = _fault(message["content"], "content")
        if fault:
            return f"has a message of the {message['role']} that {fault}"
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if roles[:1] != ["user"]:
        return f"is a chat that starts with the {roles[0] if roles else 'system'}, not with the user"
    return {"messages": messages} if "assistant" in roles else "is a chat without a turn of the assistant"


def _turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


_READ: dict[str, Callable[[dict[str, Any], Columns], dict[str, Any] | str]] = {
    "classification": _classified,
    "completion": _completed,
    "chat": _chatted,
    "text": lambda row, columns: _fault(row["text"], "text") or row,
}
