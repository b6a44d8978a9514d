"""One row of users' data in the columns of a form, and what is wrong with it."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from dynrank.app.tasks.data.columns import COLUMNS, Columns, Theirs
from dynrank.errors import shown

_ROLES = ("system", "developer", "user", "assistant", "tool")
# ShareGPT's names.
_OTHER_ROLES = {"human": "user", "gpt": "assistant"}
_KEYS_OF_A_TURN = (("role", "content"), ("from", "value"))
_TEXT = datasets.Value("string")


class UnusableRow(ValueError):
    """What is wrong with a row."""


def features_of(columns: Columns, label: Any) -> datasets.Features:
    """The types of the columns that :func:`checked_rows` makes; ``label`` is the type of the user's labels."""
    made: dict[str, Any] = dict.fromkeys(COLUMNS[columns.form], _TEXT)
    if columns.form == "chat":
        made["messages"] = datasets.List({"role": _TEXT, "content": _TEXT})
    if isinstance(label, datasets.List):
        made["label"] = datasets.List(_TEXT)
    return datasets.Features({**made, "place": datasets.Value("int64"), "fault": _TEXT})


def checked_rows(
    batch: Mapping[str, list[Any]], indices: Sequence[int], *, columns: Columns, first: int, label: Any
) -> dict[str, list[Any]]:
    """Our columns of a batch of rows; also the place of each, and None or what is wrong with it as its fault.

    Args:
        batch: the user's columns.
        indices: the indices of the rows.
        columns: how the user's columns are read.
        first: the place of the row with the index 0.
        label: the type of the user's labels in ``datasets``; None if there are none.
    """
    rows = (dict(zip(batch, cells, strict=True)) for cells in zip(*batch.values(), strict=True))
    made = [_checked(row, columns, label) | {"place": first + i} for i, row in zip(indices, rows, strict=True)]
    return {name: [row.get(name) for row in made] for name in features_of(columns, label)}


def _checked(row: Mapping[str, Any], columns: Columns, label: Any) -> dict[str, Any]:
    try:
        found = {ours: _joined(row, theirs) for ours, theirs in columns.names.items()}
        if columns.form == "chat":
            return {"messages": _chat(found["messages"], asked=columns.asked)}
        for name, value in found.items():
            if name == "label":
                found[name] = _label(value, label)
            else:
                _refuse_no_text(value, name)
    except UnusableRow as error:
        return {"fault": str(error)}
    return found


def _joined(row: Mapping[str, Any], theirs: Theirs) -> Any:
    """The value of a column, or of several: their texts that are not empty, each in a new line."""
    if isinstance(theirs, str):
        return row.get(theirs)
    filled = [row[name] for name in theirs if row.get(name) is not None]
    strange = [value for value in filled if not isinstance(value, str)]
    return strange[0] if strange else "\n".join(text for text in filled if text.strip())


def _refuse_no_text(value: Any, name: str) -> None:
    """Refuse a value that is no text, or blank."""
    if not isinstance(value, str) or not value.strip():
        raise UnusableRow(f"{name} must be a text that is not blank, got {shown(value)}")


def _label(value: Any, kind: Any) -> str | list[str]:
    """The label of a row as a text, or its labels."""
    several = isinstance(kind, datasets.List)
    labels = value if isinstance(value, list) else [value]
    classes = getattr(kind.feature if several else kind, "names", None)
    if classes is not None:
        # datasets writes -1 where there is none.
        labels = [None if number in (None, -1) else classes[number] for number in labels]
    for label in labels:
        if not isinstance(label, int):
            _refuse_no_text(label, "label")
    if isinstance(value, list) != several:
        raise UnusableRow(f"label must be {'a list' if several else 'one label'} as in other rows, got {shown(value)}")
    names = [str(label) for label in labels]
    # As a vector with a flag for each class would.
    if len({*names}) < len(names):
        raise UnusableRow(f"label must name no label twice, got {shown(value)}; write the labels that the row has")
    return names if several else names[0]


def _chat(turns: Any, *, asked: bool) -> list[dict[str, str]]:
    found = [_turn(turn) for turn in (turns if isinstance(turns, list) else [turns])]
    # A question ends before the answer.
    while asked and found and found[-1]["role"] == "assistant":
        found.pop()
    roles = [message["role"] for message in found if message["role"] not in ("system", "developer")]
    if roles[:1] != ["user"]:
        raise UnusableRow(f"the chat must start with the user, got {[message['role'] for message in found]}")
    if not asked and "assistant" not in roles:
        raise UnusableRow("the chat has no turn of the assistant")
    return found


def _turn(turn: Any) -> dict[str, str]:
    """A turn of a chat with our names of roles."""
    keys = [keys for keys in _KEYS_OF_A_TURN if isinstance(turn, Mapping) and isinstance(turn.get(keys[0]), str)]
    if not keys:
        raise UnusableRow(f"each message must have a role and a content, or from and value, got {shown(turn)}")
    role, content = (turn.get(key) for key in keys[0])
    role = _OTHER_ROLES.get(role, role)
    if role not in _ROLES:
        raise UnusableRow(f"roles must be {', '.join(_ROLES)}, got {role!r}")
    _refuse_no_text(content, f"message of the {role}")
    return {"role": role, "content": content}
