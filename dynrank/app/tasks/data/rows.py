"""Users' rows in the columns of a form: each is checked, and all faults are listed at once."""

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import datasets
from datasets.fingerprint import Hasher

from dynrank.app.tasks.data.columns import Theirs, each
from dynrank.app.tasks.data.source import RawRows, reading
from dynrank.errors import ConfigurationError, shown

# The most faults that one message lists, and the most rows of one fault.
SHOWN = 20
_TEXT = datasets.Value("string")


def fingerprint(function: Callable[..., Any], *inputs: Any) -> str:
    """The name by which ``datasets`` stores what a function makes of ``inputs``; new for new code in its file."""
    return Hasher.hash((inspect.getsource(sys.modules[function.__module__]), *inputs))  # type: ignore[no-any-return]


def usable_rows(
    raw: RawRows, names: Mapping[str, Theirs], *, asked: bool = False, skip: bool = False
) -> tuple[datasets.Dataset, int]:
    """The rows with our columns, and ``place``, the number of each; and how many were left out.

    Args:
        raw: the user's rows.
        names: {our name of a column: the user's}.
        asked: whether chats are questions, which end before the answer.
        skip: leave out rows with a fault; otherwise one error lists them.
    """
    rows = raw.rows.select_columns([*dict.fromkeys(name for theirs in names.values() for name in each(theirs))])
    label = rows.features.get(names.get("label"))
    features = datasets.Features({**dict.fromkeys(names, _TEXT), "place": datasets.Value("int64"), "fault": _TEXT})
    if "messages" in names:
        features["messages"] = datasets.List({"role": _TEXT, "content": _TEXT})
    options = {"names": names, "label": label, "first": raw.first, "asked": asked}
    with reading(raw.where):
        made = rows.map(
            checked_row,
            with_indices=True,
            fn_kwargs=options,
            remove_columns=rows.column_names,
            features=features,
            new_fingerprint=fingerprint(checked_row, raw.rows._fingerprint, str(options)),
        )
    faults = made["fault"][:]
    wrong = [i for i, fault in enumerate(faults) if fault is not None]
    if wrong and not (skip and len(wrong) < len(made)):
        refuse(raw.where, [(raw.first + i, faults[i]) for i in wrong])
    kept = made.select([i for i, fault in enumerate(faults) if fault is None]) if wrong else made
    return kept.remove_columns("fault"), len(wrong)


def refuse(where: str, faults: Iterable[tuple[int, str]]) -> None:
    """Raise one error that lists all faults, each with the numbers of its rows."""
    places: dict[str, list[int]] = {}
    for place, fault in sorted(faults):
        places.setdefault(fault, []).append(place)
    said = []
    for fault, rows in [*places.items()][:SHOWN]:
        more = f" and {len(rows) - SHOWN:,} more" if len(rows) > SHOWN else ""
        said.append(f"row{'s' * (len(rows) > 1)} {', '.join(map(str, rows[:SHOWN]))}{more}: {fault}")
    said += [f"and {len(places) - SHOWN:,} other faults"] if len(places) > SHOWN else []
    advice = "correct them"
    # The rows of dynrank predict have no such key.
    advice += ", or set data.skip_unusable=true" if where.startswith("data.") else ""
    raise ConfigurationError("\n  ".join([f"{where} has rows that cannot be used; {advice}:", *said]))


def checked_row(
    row: Mapping[str, Any], index: int, *, names: Mapping[str, Theirs], label: Any, first: int, asked: bool
) -> dict[str, Any]:
    """Our columns of a row, its place, and None or what is wrong with it as its fault; see :func:`usable_rows`.

    ``label`` is the type of the user's labels in ``datasets``, and ``first`` the place of the row with the index 0.
    """
    found = {ours: _joined(row, theirs) for ours, theirs in names.items()}
    fault = None
    try:
        for ours, value in found.items():
            if ours == "messages":
                found[ours] = _chat(value, asked=asked)
            elif ours == "label":
                found[ours] = _label(value, label)
            else:
                _refuse_no_text(value, ours)
    except ConfigurationError as error:
        found, fault = dict.fromkeys(names), str(error)
    return {**found, "place": first + index, "fault": fault}


def _joined(row: Mapping[str, Any], theirs: Theirs) -> Any:
    """The value of a column, or of several: their texts that are not empty, each in a new line."""
    if isinstance(theirs, str):
        return row[theirs]
    filled = [row[name] for name in theirs if row[name] is not None]
    strange = [value for value in filled if not isinstance(value, str)]
    return strange[0] if strange else "\n".join(text for text in filled if text.strip())


def _refuse_no_text(value: Any, name: str) -> None:
    """Refuse a value that is no text, or blank."""
    if not isinstance(value, str) or not value.strip():
        raise ConfigurationError(f"{name} must be a text that is not blank, got {shown(value)}")


def _label(value: Any, kind: Any) -> str:
    """The label of a row as a text."""
    classes = getattr(kind, "names", None)
    if classes is not None:
        # datasets writes -1 where there is none.
        value = None if value in (None, -1) else classes[value]
    if not isinstance(value, int):
        _refuse_no_text(value, "label")
    return str(value)


def _chat(turns: Any, *, asked: bool) -> list[dict[str, str]]:
    found = list[dict[str, str]]()
    for turn in turns if isinstance(turns, list) else [turns]:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            raise ConfigurationError(f"each message must have a role and a content, got {shown(turn)}")
        _refuse_no_text(turn.get("content"), f"message of the {turn['role']}")
        found.append({"role": turn["role"], "content": turn["content"]})
    # A question ends before the answer.
    while asked and found and found[-1]["role"] == "assistant":
        found.pop()
    roles = [message["role"] for message in found if message["role"] not in ("system", "developer")]
    if roles[:1] != ["user"]:
        raise ConfigurationError(f"the chat must start with the user, got {[message['role'] for message in found]}")
    if not asked and "assistant" not in roles:
        raise ConfigurationError("the chat has no turn of the assistant")
    return found
