"""What a row of data holds: its columns by form, the names that these usually have, and what may be wrong with it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import datasets

from dynrank.errors import ConfigurationError, shown

__all__ = ["COLUMNS", "Form", "bars_on_terminals", "check_rows", "each", "find_columns", "form_of"]

Form = Literal["classification", "completion", "chat", "text"]
COLUMNS: dict[str, tuple[str, ...]] = {
    "classification": ("text", "label"),  # and text_pair, if there is one
    "completion": ("prompt", "answer"),
    "chat": ("messages",),
    "text": ("text",),
}
_USUAL = {  # names in users' files, in lower case
    "text": ("text", "sentence", "body", "content", "review", "document", "text1", "sentence1", "premise", "question"),
    "text_pair": ("text_pair", "text2", "sentence2", "hypothesis"),
    "label": ("label", "labels", "class", "category", "topic", "target", "intent", "sentiment", "tags"),
    "prompt": ("prompt", "instruction", "question", "input", "query"),
    "answer": ("answer", "completion", "response", "output", "target"),
    "messages": ("messages", "conversations", "conversation", "chat", "dialog", "dialogue"),
}


def find_columns(names: Sequence[str], given: Mapping[str, str | None], form: str, where: str) -> dict[str, str]:
    """{a column's name here: its name in the data}, for all columns of a form.

    Args:
        names: of the columns that there are.
        given: what the user calls them; None: as usual.
        form: of the rows.
        where: the data, for errors.

    Raises:
        ConfigurationError: if one is missing.
    """
    found: dict[str, str] = {}
    for ours in (*COLUMNS[form], *(["text_pair"] if form == "classification" else [])):
        by_name = {name.lower(): name for name in reversed(names) if name not in found.values()}
        theirs = given.get(ours) or next((by_name[usual] for usual in _USUAL[ours] if usual in by_name), None)
        if theirs in names:
            found[ours] = str(theirs)
        elif theirs is not None or ours in COLUMNS[form]:
            wanted = f"column {theirs!r}" if theirs else f"{ours} column by a usual name ({', '.join(_USUAL[ours])})"
            raise ConfigurationError(f"{where} has no {wanted}; it has {[*names]}; set data.columns.{ours}")
    return found


def form_of(names: Sequence[str], forms: Sequence[Form], where: str) -> tuple[Form, dict[str, str]]:
    """The first of ``forms`` whose columns are among ``names``, as they are usually called, and what they are here.

    Raises:
        ConfigurationError: if there is none.
    """
    for form in forms:
        with suppress(ConfigurationError):
            return form, find_columns(names, {}, form, where)
    wanted = ", or ".join(" and ".join(COLUMNS[form]) for form in forms)
    raise ConfigurationError(f"{where} must have the columns {wanted}, by usual names; it has {[*names]}; rename them")


def bars_on_terminals() -> None:
    """Let datasets show its progress where somebody watches, and nowhere else."""
    (datasets.enable_progress_bars if sys.stderr.isatty() else datasets.disable_progress_bars)()


def each(rows: datasets.Dataset) -> Iterator[dict[str, Any]]:
    """The rows one by one, read a thousand at a time."""
    for batch in rows.iter(1000):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def check_rows(rows: datasets.Dataset | Iterable[Mapping[str, Any]], form: str, where: str) -> None:
    """Refuse a row that cannot be used.

    Args:
        rows: with our names of columns.
        form: of them.
        where: the data, for errors.

    Raises:
        ConfigurationError: naming the first such row by its number, from 1 on, or that there is none.
    """
    number = 0
    for number, row in enumerate(each(rows) if isinstance(rows, datasets.Dataset) else rows, start=1):
        fault: str = _FAULTS[form](row)
        if fault:
            raise ConfigurationError(f"{where}: row {number} {fault}; correct it, or set data")
    if number == 0:
        raise ConfigurationError(f"{where} has 0 rows; set data")


def _no_text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        return f"has no {column}" if value is None else f"has an empty {column}"
    return "" if isinstance(value, str) else f"must have a text as its {column}, got {shown(value)}"


def _of_class(row: Mapping[str, Any]) -> str:
    label = row.get("label")
    several = label if isinstance(label, list | tuple) else [label]
    if label is None or label == "":
        return "has no label"
    if any(not isinstance(one, str | int) for one in several):
        return f"must have texts or ints as labels, got {shown(label)}"
    return _no_text(row, "text") or (_no_text(row, "text_pair") if "text_pair" in row else "")


def _of_chat(row: Mapping[str, Any]) -> str:
    turns = row.get("messages")
    if not isinstance(turns, list | tuple) or not turns:
        return "has no messages"
    for turn in turns:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            return f"must have messages with a role and a content, got {shown(turn)}"
        if _no_text(turn, "content"):
            return f"has a message of the {turn['role']} that {_no_text(turn, 'content')}"
    roles = [turn["role"] for turn in turns if turn["role"] != "system"]
    if roles[:1] != ["user"]:
        return f"is a chat that starts with the {roles[0] if roles else 'system'}, not with the user"
    return "" if "assistant" in roles else "is a chat without a turn of the assistant"


_FAULTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "classification": _of_class,
    "completion": lambda row: _no_text(row, "prompt") or _no_text(row, "answer"),
    "chat": _of_chat,
    "text": lambda row: _no_text(row, "text"),
}
