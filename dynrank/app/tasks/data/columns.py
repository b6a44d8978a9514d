"""The columns of a form in users' data: by the field's names, or as the user names them."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Literal

from dynrank.errors import ConfigurationError

Form = Literal["classification", "completion", "chat", "text"]
COLUMNS: dict[str, tuple[str, ...]] = {
    "classification": ("text", "label"),
    "completion": ("prompt", "answer"),
    "chat": ("messages",),
    "text": ("text",),
}
# Another name of the field for some of these.
_ALSO = {"label": "labels", "answer": "completion"}
# Columns with the answers: rows to predict need none.
_ANSWERS = ("label", "answer")

# The name of a column in the data, or the names of several whose texts are joined.
Theirs = str | tuple[str, ...]
# {our name of a column: the user's; None: our own}.
Given = Mapping[str, str | Sequence[str] | None]


def each(theirs: Theirs) -> tuple[str, ...]:
    """The names of one column or of several."""
    return (theirs,) if isinstance(theirs, str) else theirs


def find_columns(
    columns: Sequence[str], given: Given, form: Form, where: str, *, asked: bool = False
) -> dict[str, Theirs]:
    """{our name of a column of ``form``: its name in the data, or several names}.

    Args:
        columns: the names of the columns that the data have.
        given: the user's names, or those of training.
        form: form of the rows.
        where: name of the data in errors.
        asked: whether the rows are questions, which need no label or answer.
    """
    wanted = [ours for ours in COLUMNS[form] if not (asked and ours in _ANSWERS)]
    if unread := [ours for ours, theirs in given.items() if theirs and ours not in wanted]:
        raise ConfigurationError(f"data.columns.NAME must name one of {wanted} for the form {form}, got {unread}")
    found: dict[str, Theirs] = {}
    for ours in wanted:
        usual = next((name for name in (ours, _ALSO.get(ours, ours)) if name in columns), ours)
        chosen = given.get(ours) or usual
        theirs = found[ours] = chosen if isinstance(chosen, str) else tuple(chosen)
        if ours in ("label", "messages") and not isinstance(theirs, str):
            raise ConfigurationError(f"data.columns.{ours} must be one column, got {[*theirs]}; only texts are joined")
        for name in each(theirs):
            if name not in columns:
                near = get_close_matches(name.lower(), columns, n=1)
                cure = f"set data.columns.{ours}={near[0] if near else 'NAME'}"
                # Data of Python and dynrank predict have no key for it.
                cure = cure if where.startswith("data.") else "rename one"
                raise ConfigurationError(f"{where} has no column {name!r}; it has {[*columns]}; {cure}")
    return found
