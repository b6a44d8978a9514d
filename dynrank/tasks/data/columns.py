"""Finding the columns of a form in users' data, by the names that they usually have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import datasets

from dynrank.errors import ConfigurationError

Form = Literal["classification", "completion", "chat", "text"]
COLUMNS: dict[str, tuple[str, ...]] = {
    "classification": ("text", "label"),
    "completion": ("prompt", "answer"),
    "chat": ("messages",),
    "text": ("text",),
}
# Optional columns of each form.
_MORE = {"classification": ("text_pair",), "completion": ("input",), "chat": ("system",), "text": ()}
# Names in users' files, in lower case: our own, and those of LLaMA-Factory, axolotl and TRL.
_USUAL = {
    "text": ("text", "sentence", "body", "content", "review", "document", "text1", "sentence1", "premise", "question"),
    "text_pair": ("text_pair", "text2", "sentence2", "hypothesis"),
    "label": ("label", "labels", "class", "category", "topic", "target", "intent", "sentiment", "tags"),
    "prompt": ("prompt", "instruction", "question", "input", "query"),
    "answer": ("answer", "completion", "response", "output", "generation", "target", "summary"),
    "messages": ("messages", "conversations", "conversation", "chat", "dialog", "dialogue"),
    "input": ("input", "query", "context", "article"),
    "system": ("system", "system_prompt"),
}
# Names that these programs use and dynrank does not.
_UNREAD = ("history", "tools", "chosen", "rejected", "kto_tag", "images", "videos", "audios", "thinking")
KEYS_OF_A_TURN = (("role", "content"), ("from", "value"))
# Columns are found in this many first rows.
SNIFFED = 1000

Sample = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Columns:
    """The columns of a data set.

    Attributes:
        form: form of the rows.
        names: {our name of a column: its name in the data}.
        unused: columns that other programs use, and the form does not.
        several: whether a row has a list of labels.
        classes: names of the labels, if ``datasets`` stores the labels as numbers.
    """

    form: str
    names: Mapping[str, str]
    unused: Sequence[str] = ()
    several: bool = False
    classes: Sequence[str] | None = None


def find_columns(
    sample: Sample, given: Mapping[str, str | None], form: str, where: str, types: Mapping[str, Any] | None = None
) -> Columns:
    """The columns of data whose first rows are ``sample``.

    ``given`` are the user's names of columns (None: a usual name), ``types`` those of ``datasets``, if it has read the
    data. Errors name the data as ``where``.
    """
    columns = _names_in(sample)
    names = _found(columns, given, form)
    for ours, theirs in names.items():
        if not theirs or theirs not in columns:
            usual = f"{ours} column with a usual name ({', '.join(_USUAL[ours])})"
            fix = [f"set data.columns.{ours} to one of these"]
            fix += ["set data.columns.prompt and data.columns.answer"] * (ours == "messages")
            fix += ["write a first line with names of columns"] * where.endswith((".csv", ".tsv"))
            fix += [
                f"set task={other}, which takes them" for other in COLUMNS if not theirs and _fits(columns, other, {})
            ]
            wanted = f"column {theirs!r}" if theirs else usual
            raise ConfigurationError(f"{where} has no {wanted}; it has {columns}; {', or '.join(fix)}")
    if form == "completion" and _are_turns(sample, names["prompt"]):
        raise ConfigurationError(f"{where} has chats in its column {names['prompt']!r}; set task=chat")
    known = {usual for each in _USUAL.values() for usual in each} | {*_UNREAD}
    unused = [name for name in columns if name.lower() in known and name not in names.values()]
    turns = [turn for row in sample for turn in _list(row.get(names.get("messages", ""))) if isinstance(turn, Mapping)]
    taken = {key for pair in KEYS_OF_A_TURN for key in pair}
    more = dict.fromkeys(key for turn in turns for key, value in turn.items() if value is not None and key not in taken)
    label = names.get("label", "")
    kind = getattr((types or {}).get(label), "feature", (types or {}).get(label))
    return Columns(
        form,
        names,
        unused=[*unused, *(f"{names['messages']}.{key}" for key in more)],
        several=any(isinstance(row.get(label), list | tuple) for row in sample),
        classes=kind.names if isinstance(kind, datasets.ClassLabel) else None,
    )


def form_of(sample: Sample, forms: Sequence[Form], given: Mapping[str, str], where: str) -> Form:
    """The first of ``forms`` whose columns the data have, by the user's names (``given``) or by usual names."""
    columns = _names_in(sample)
    places = {name for form in forms for name in (*COLUMNS[form], *_MORE[form])}
    for ours, theirs in given.items():
        if ours not in places or theirs not in columns:
            allowed = f"OURS one of {sorted(places)} and THEIRS one of {columns} in {where}"
            raise ConfigurationError(f"--columns must be OURS=THEIRS, {allowed}; got {ours}={theirs}")
    for form in sorted(forms, key=lambda form: given.keys().isdisjoint(COLUMNS[form])):
        if _fits(columns, form, given):
            prompt = _usual(columns, given, COLUMNS["completion"], {})["prompt"]
            return "chat" if form == "completion" and _are_turns(sample, prompt) else form
    wanted = ", or ".join(" and ".join(COLUMNS[form]) for form in forms)
    usual = f"{where} must have the columns {wanted}, with usual names; it has {columns}"
    raise ConfigurationError(f"{usual}; give their names: --columns {COLUMNS[forms[0]][0]}=NAME")


def _fits(columns: Sequence[str], form: str, given: Mapping[str, str]) -> bool:
    return all(_usual(columns, given, COLUMNS[form], {}).values())


def _found(columns: Sequence[str], given: Mapping[str, str | None], form: str) -> dict[str, str]:
    """{our name: their name} of the form's columns ("" if one is missing), and of the optional columns that exist."""
    wanted = COLUMNS[form]
    found = _usual(columns, given, wanted, {})
    if form == "chat" and not found["messages"]:
        pair = _usual(columns, given, COLUMNS["completion"], {})
        found = pair if all(pair.values()) else found
    more = [*_MORE[form], *(["input"] if form == "chat" and "prompt" in found else [])]
    return found | {ours: theirs for ours, theirs in _usual(columns, given, more, found).items() if theirs}


def _usual(
    columns: Sequence[str], given: Mapping[str, str | None], wanted: Sequence[str], before: Mapping[str, str]
) -> dict[str, str]:
    found: dict[str, str] = {}
    for ours in wanted:
        taken = {*before.values(), *found.values()}
        free = {name.lower(): name for name in reversed(columns) if name not in taken}
        found[ours] = given.get(ours) or next((free[usual] for usual in _USUAL[ours] if usual in free), "")
    return found


def _names_in(sample: Sample) -> list[str]:
    return [*dict.fromkeys(str(name) for row in sample for name in row)]


def _are_turns(sample: Sample, column: str) -> bool:
    return any(isinstance(row.get(column), list) for row in sample)


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()
