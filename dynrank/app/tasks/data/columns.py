"""Finding the columns of a form in users' data: by the field's usual names, or as the user names them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from dynrank.errors import ConfigurationError, shown

Form = Literal["classification", "completion", "chat", "text"]
COLUMNS: dict[str, tuple[str, ...]] = {
    "classification": ("text", "label"),
    "completion": ("prompt", "answer"),
    "chat": ("messages",),
    "text": ("text",),
}
# Optional columns of each form.
_MORE: dict[str, tuple[str, ...]] = {"completion": ("input",), "chat": ("system", "input")}
# Names in users' files, in lower case: our own, and those of TRL, LLaMA-Factory and axolotl.
_USUAL = {
    "text": ("text", "sentence", "body", "content", "review", "document", "text1", "sentence1", "premise", "question"),
    "label": ("label", "labels", "class", "category", "topic", "target", "intent", "sentiment", "tags"),
    "prompt": ("prompt", "instruction", "question", "input", "query"),
    "answer": ("answer", "completion", "response", "output", "generation", "target", "summary"),
    "messages": ("messages", "conversations", "conversation", "chat", "dialog", "dialogue"),
    "input": ("input", "query", "context", "article"),
    "system": ("system", "system_prompt"),
}
# Columns with the answers: rows to predict need none.
_ANSWERS = ("label", "answer")
# Columns are found in this many first rows.
SNIFFED = 1000

Sample = Sequence[Mapping[str, Any]]
# The name of a column in the data, or the names of several whose texts are joined.
Theirs = str | tuple[str, ...]
# {our name of a column: the user's; None: a usual name}.
Given = Mapping[str, str | Sequence[str] | None]


@dataclass(frozen=True)
class Columns:
    """The columns of a data set.

    Attributes:
        form: form of the rows.
        names: {our name of a column: its name in the data, or several names}.
        unused: the other columns.
        several: whether a row has a list of labels.
        asked: whether the rows are questions, without label or answer.
    """

    form: Form
    names: Mapping[str, Theirs]
    unused: Sequence[str] = ()
    several: bool = False
    asked: bool = False

    def __str__(self) -> str:
        return ", ".join(f"{ours} <- {' + '.join(each(theirs))}" for ours, theirs in self.names.items())


def each(theirs: Theirs) -> tuple[str, ...]:
    """The names of one column or of several."""
    return (theirs,) if isinstance(theirs, str) else theirs


def find_columns(
    sample: Sample,
    given: Given,
    form: Form,
    where: str,
    *,
    trained: Mapping[str, Theirs] | None = None,
    asked: bool = False,
) -> Columns:
    """The columns of data whose first rows are ``sample``.

    ``given`` are the user's names of columns. If the training rows are others, ``trained`` are their columns: these
    come before usual names, and an optional column is read only if it is among them, or given. Rows that are ``asked``
    need no label or answer. Errors name the data as ``where``.
    """
    refuse_unknown(given, where)
    columns = names_in(sample)
    if trained is not None:
        same = {ours: theirs for ours, theirs in trained.items() if {*columns}.issuperset(each(theirs))}
        given = same | {ours: theirs for ours, theirs in given.items() if theirs}
    names = _found(columns, given, form, asked=asked, more=trained is None)
    for ours, theirs in names.items():
        if ours in ("label", "messages") and not isinstance(theirs, str):
            raise ConfigurationError(f"{ours} must be one column, got {[*theirs]}; only texts are joined")
        for name in each(theirs):
            if name not in columns:
                raise ConfigurationError(_missing(name, ours, columns, form, where))
    if form == "completion" and not asked and _are_turns(sample, names["prompt"]):
        raise ConfigurationError(f"{where} has chats in its column {names['prompt']!r}; set task=chat")
    used = {name for theirs in names.values() for name in each(theirs)}
    label = str(names.get("label"))
    lists = [row[label] for row in sample if isinstance(row.get(label), list)]
    if _are_flags(lists):
        raise ConfigurationError(
            f"{where} has vectors of 0 and 1 in its column {label!r}, such as {shown(lists[0])}, which name no labels; "
            "write in each row the list of the labels that it has"
        )
    unused = [name for name in columns if name not in used]
    return Columns(form, names, unused=unused, several=bool(lists), asked=asked)


def form_of(sample: Sample, forms: Sequence[Form], given: Mapping[str, Theirs], where: str) -> Form:
    """The first of ``forms`` whose columns (without answers) the data have, by ``given`` or usual names."""
    columns = names_in(sample)
    for form in sorted(forms, key=lambda form: given.keys().isdisjoint(COLUMNS[form])):
        found = _usual(columns, given, _required(form, asked=True))
        if all(found.values()):
            return "chat" if form == "completion" and _are_turns(sample, found["prompt"]) else form
    wanted = ", or ".join(" and ".join(_required(form, asked=True)) for form in forms)
    usual = f"{where} must have the columns {wanted}, with usual names; it has {columns}"
    raise ConfigurationError(f"{usual}; give their names: --columns {COLUMNS[forms[0]][0]}=NAME")


def columns_to_ask(trained: Mapping[str, Theirs], form: Form) -> dict[str, Theirs]:
    """The columns of training by which rows of ``form`` are asked: not the answers, nor columns of other forms."""
    read = {*COLUMNS[form], *_MORE.get(form, ()), *(["prompt"] if form == "chat" else [])} - {*_ANSWERS}
    return {ours: theirs for ours, theirs in trained.items() if ours in read}


def is_optional(ours: str) -> bool:
    """Whether rows of a form may lack our column."""
    return any(ours in names for names in _MORE.values())


def refuse_unknown(given: Given, where: str) -> None:
    """Refuse names of columns that no form has; errors name the data as ``where``."""
    for key in given:
        if key not in _USUAL:
            asked_by = f"data.columns.{key}" if where.startswith("data") else f"--columns {key}=…"
            raise ConfigurationError(f"{asked_by} names no column that is read; those are {', '.join(sorted(_USUAL))}")


def refuse_unread(given: Given, found: Columns, option: str = "--columns") -> None:
    """Refuse names that a user has given by ``option``, and that the form of ``found`` does not read."""
    unread = sorted(ours for ours, theirs in given.items() if theirs and ours not in found.names)
    if unread:
        allowed = f"{sorted(found.names)} for the form {found.form}"
        raise ConfigurationError(f"{option} must name one of {allowed}, got {unread}")


def names_in(sample: Sample) -> list[str]:
    """The names of the columns that the rows have."""
    return [*dict.fromkeys(str(name) for row in sample for name in row)]


def _required(form: str, *, asked: bool) -> list[str]:
    """The columns that rows of a form must have."""
    return [name for name in COLUMNS[form] if not (asked and name in _ANSWERS)]


def _found(columns: Sequence[str], given: Given, form: str, *, asked: bool, more: bool) -> dict[str, Theirs]:
    """{our name: their name} of the form's columns ("" if one is missing), and of the optional columns that exist.

    Without ``more``, optional columns are only those that are ``given``; one that is given as "" is not read.
    """
    found = _usual(columns, given, _required(form, asked=asked))
    if form == "chat" and (not found["messages"] or (given.get("prompt") and not given.get("messages"))):
        pair = _usual(columns, given, _required("completion", asked=asked))
        found = pair if all(pair.values()) else found
    optional = [ours for ours in _MORE.get(form, ()) if given.get(ours) or (more and given.get(ours) != "")]
    optional = [ours for ours in optional if ours != "input" or "prompt" in found]
    return found | {ours: theirs for ours, theirs in _usual(columns, given, optional, found).items() if theirs}


def _usual(
    columns: Sequence[str], given: Given, wanted: Sequence[str], before: Mapping[str, Theirs] | None = None
) -> dict[str, Theirs]:
    """{our name: the user's, or a usual one that no other column has yet; ""}."""
    found: dict[str, Theirs] = {}
    for ours in wanted:
        taken = {name for theirs in (*(before or {}).values(), *found.values()) for name in each(theirs)}
        free = {name.lower(): name for name in reversed(columns) if name not in taken}
        theirs = given.get(ours) or next((free[usual] for usual in _USUAL[ours] if usual in free), "")
        found[ours] = theirs if isinstance(theirs, str) else tuple(theirs)
    return found


def _missing(name: str, ours: str, columns: Sequence[str], form: Form, where: str) -> str:
    """What to say of a column ``name`` that the data lack; "" is one with a usual name."""
    wanted = f"column {name!r}" if name else f"{ours} column with a usual name ({', '.join(_USUAL[ours])})"
    near = get_close_matches(name.lower(), columns, n=1)
    key = f"set data.columns.{ours} to" if where.startswith("data") else f"give --columns {ours}=NAME with"
    fix = (
        f"rename one of these to {ours}"
        if where.startswith("data,")
        else f"{key} {near[0] if near else 'one of these'}"
    )
    others = [other for other in COLUMNS if all(_usual(columns, {}, _required(other, asked=False)).values())]
    fix += "".join(f", or set task={other}, which takes them" for other in others if other != form and not name)
    return f"{where} has no {wanted}; it has {[*columns]}; {fix}"


def _are_turns(sample: Sample, column: Theirs) -> bool:
    return any(isinstance(row.get(name), list) for row in sample for name in each(column))


def _are_flags(lists: Collection[Sequence[Any]]) -> bool:
    """Whether lists of labels are vectors with a flag for each class.

    As labels, no number would stand in a list twice, and the same two would stand in one order.
    """
    vectors = [[*flags] for flags in lists]
    return (
        len({*map(len, vectors)}) == 1
        and all(flag in (0, 1) for vector in vectors for flag in vector)
        and (any(len({*vector}) < len(vector) for vector in vectors) or ([0, 1] in vectors and [1, 0] in vectors))
    )
