"""Rows of users' data in the columns of a form, checked in the same pass; all faults are listed at once."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import islice
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dynrank.errors import ConfigurationError, shown
from dynrank.tasks.data.columns import COLUMNS, KEYS_OF_A_TURN, Columns

# Columns that dynrank.tasks.data.source adds: a row's number and its fault where a file has other rows than the data
# set, and rows that are still texts: a line of JSON, or a paragraph.
ROW, FAULT, LINE, PARAGRAPH = "dynrank.row", "dynrank.fault", "dynrank.line", "dynrank.paragraph"
# The most faults that one message lists, and the most rows of one fault.
SHOWN = 20
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
_TEXT = datasets.Value("string")
# A row with its number, from 1 on, or with a text that says what is wrong.
Numbered = tuple[int, Mapping[str, Any] | str]


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


def numbered(batch: Mapping[str, Sequence[Any]], indices: Iterable[int]) -> Iterator[Numbered]:
    """The rows of a batch of columns; blank lines and paragraphs are none."""
    for name, made_of in ((LINE, _row_in), (PARAGRAPH, lambda text: {"text": text.strip("\n")})):
        if name in batch:
            yield from ((i + 1, made_of(text)) for i, text in zip(indices, batch[name], strict=True) if text.strip())
            return
    for i, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
        row = dict(zip(batch, values, strict=True))
        number, fault = row.pop(ROW, i + 1), row.pop(FAULT, None)
        yield number, fault or row


def read_rows(rows: Iterable[Numbered], columns: Columns) -> dict[str, list[Any]]:
    """Our columns of the rows; also the digest of each row's text, its place (the number) and its fault, or null."""
    made: dict[str, list[Any]] = {name: [] for name in features_of(columns)}
    for number, row in rows:
        found = row if isinstance(row, str) else _READ[columns.form](_renamed(row, columns), columns)
        values: Mapping[str, Any] = {"fault": found} if isinstance(found, str) else found
        text = str(values.get(COLUMNS[columns.form][0]))
        digest = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), signed=True)
        values = {**values, "digest": digest, "place": number}
        for name, column in made.items():
            column.append(values.get(name))
    return made


def usable_rows(rows: datasets.Dataset, where: str, *, skip: bool = False) -> datasets.Dataset:
    """The result of :func:`read_rows` without the column of faults, and with ``skip`` without the rows that have one.

    Otherwise one error lists all faults; it names the data as ``where``.
    """
    if not len(rows):
        raise ConfigurationError(f"{where} has 0 rows; correct it")
    faults = column_of(rows, "fault")
    wrong = pc.indices_nonzero(pc.is_valid(faults))
    if len(wrong) and not (skip and len(wrong) < len(rows)):
        places = column_of(rows, "place").take(wrong).to_pylist()
        refuse(where, zip(places, faults.take(wrong).to_pylist(), strict=True), "correct")
    kept = rows.select(np.flatnonzero(pc.is_null(faults))) if len(wrong) else rows
    return kept.remove_columns("fault")


def rows_of_shared_labels(rows: datasets.Dataset, where: str, *, skip: bool) -> datasets.Dataset:
    """The rows whose labels other rows have, too: a label of one row is either not learned or not tested.

    With ``skip`` other rows are left out; otherwise one error lists them.
    """
    single = [label for label, count in counted(rows).items() if count == 1]
    if not single:
        return rows
    labels = column_of(rows, "label").combine_chunks()
    row_of_label = np.arange(len(rows))
    if pa.types.is_list(labels.type):
        row_of_label = pc.list_parent_indices(labels).to_numpy()
        labels = pc.list_flatten(labels)
    alone = np.flatnonzero(pc.is_in(labels, pa.array(single)))
    if not skip:
        places = column_of(rows, "place").take(row_of_label[alone]).to_pylist()
        said = [f"alone has the label {label!r}" for label in labels.take(alone).to_pylist()]
        refuse(where, zip(places, said, strict=True), "add rows to, or remove,")
    return rows.select(np.setdiff1d(np.arange(len(rows)), row_of_label[alone]))


def refuse(where: str, faults: Iterable[tuple[int, str]], advice: str) -> None:
    """Raise one error that lists all faults, each with the numbers of its rows."""
    places: dict[str, list[int]] = {}
    for place, fault in sorted(faults):
        places.setdefault(fault, []).append(place)
    said = [_said(fault, rows) for fault, rows in islice(places.items(), SHOWN)]
    said += [f"and {len(places) - SHOWN:,} other faults"] if len(places) > SHOWN else []
    count = sum(map(len, places.values()))
    advice = f"{advice} {'it' if count == 1 else f'these {count:,}'}"
    # Only these keys have the other.
    advice += ", or set data.skip_unusable=true" if where.startswith("data.") else ""
    if len(said) == 1:
        raise ConfigurationError(f"{where}: {said[0]}; {advice}")
    raise ConfigurationError("\n  ".join([f"{where}:", *said]) + f"\n{advice}")


def _said(fault: str, rows: Sequence[int]) -> str:
    if len(rows) == 1:
        return f"row {rows[0]} {fault}"
    more = f" and {len(rows) - SHOWN:,} more" if len(rows) > SHOWN else ""
    return f"rows {', '.join(map(str, rows[:SHOWN]))}{more}: each {fault}"


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


def _row_in(line: str) -> Mapping[str, Any] | str:
    try:
        found = json.loads(line)
    # The second means that lists are nested too deeply for the parser.
    except (ValueError, RecursionError) as error:
        return f"is not JSON: {error}"
    return found if isinstance(found, dict) else f"must be a row {{column: value}}, got {shown(found)}"


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
        if turn.get("tool_calls") and not turn.get(pairs[0][1]):
            return "has tool calls, which are not learned"
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
