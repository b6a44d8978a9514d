"""The rows of a task's data by split: of files, folders and names on the hub, or of what a function returns."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any

import datasets
import numpy as np
from pydantic import Field

from dynrank.app.keys import below, named
from dynrank.app.tasks.data.columns import COLUMNS, Columns, Form, Given, Theirs, find_columns, refuse_unread
from dynrank.app.tasks.data.labels import ambiguous_texts, number_of, within_classes
from dynrank.app.tasks.data.source import Source, first_rows
from dynrank.app.tasks.data.stored import RawRows, column_of, reading, refuse, say, usable_rows
from dynrank.errors import ConfigurationError, checked_call, shown

SPLITS = ("train", "val", "test")
Pairs = dict[str, list[tuple[str, str]]]
# Columns of checked rows that no form has.
_BESIDE = ("digest", "place")


class Checked(dict[str, datasets.Dataset]):
    """{split: its rows}, in the columns of their form and checked.

    Attributes:
        dropped: number of training rows that were left out, because their text is also in another split's file.
        unusable: {split: number of rows of its file that were left out, because they cannot be used}.
        columns: {our name of a column: its name in the training rows}; empty if these have no names.
        ambiguous: {split: {label: number of its texts that have it in some of their rows, and not in others}}.
    """

    dropped: int = 0
    unusable: Mapping[str, int] = MappingProxyType({})
    columns: Mapping[str, Theirs] = MappingProxyType({})
    ambiguous: Mapping[str, Mapping[str, int]] = MappingProxyType({})


def place(key: str, seed: int, train: float, val: float) -> str:
    """The split of ``key``, a text or the name of a group, which depends only on (``seed``, ``key``).

    The share ``train`` of all keys is in the training split, and the share ``val`` in this or the validation split.
    """
    share = number_of(key, seed) / 2**64
    return "train" if share < train else "val" if share < val else "test"


def rows_by_split(data: Any, form: Form) -> Checked:
    """The rows of train, val and test with our names of columns (see :data:`dynrank.app.tasks.data.columns.COLUMNS`).

    Args:
        data: a mapping from ``train``, ``val`` and ``test`` to a ``datasets.Dataset``, or to a list of mappings or of
            tuples in the order of the columns; or a function without arguments that returns such a mapping.
        form: form of the rows.
    """
    with named(below("data")):
        splits: Any = data() if callable(data) else data
    if isinstance(splits, Checked):
        return splits
    if not isinstance(splits, Mapping) or not splits.keys() >= {*SPLITS}:
        got = sorted(splits) if isinstance(splits, Mapping) else shown(splits)
        raise ConfigurationError(f"data must have the splits {[*SPLITS]}, got {got}; set data")
    found = Checked()
    for split in SPLITS:
        raw = _raw(splits[split], form, f"data, {split}")
        trained = None if split == "train" else found.columns
        used = find_columns(first_rows(raw.rows), {}, form, raw.where, trained=trained)
        found[split], _ = usable_rows(raw, used)
        if any(isinstance(row, Mapping) for row in splits[split]):
            if split == "train":
                found.columns = used.names
            else:
                _say_columns(used, found.columns)
    return _in_form(found)


def _raw(part: Any, form: Form, where: str) -> RawRows:
    """The rows of a data set, or of a list of mappings or tuples."""
    if isinstance(part, str) or not hasattr(part, "__len__"):
        raise ConfigurationError(f"{where} must be a list of rows or a datasets.Dataset, got {shown(part)}; set data")
    if not len(part):
        raise ConfigurationError(f"{where} has 0 rows; set data")
    if isinstance(part, datasets.Dataset):
        return RawRows(where, part)
    names = COLUMNS[form]
    wanted = f"({', '.join(names)}{',' * (len(names) == 1)})"
    rows: list[Mapping[str, Any]] = []
    faults: list[tuple[int, str]] = []
    for place, row in enumerate(part, start=1):
        if isinstance(row, Sequence) and not isinstance(row, str) and len(row) == len(names):
            rows.append(dict(zip(names, row, strict=True)))
        elif isinstance(row, Mapping):
            rows.append(row)
        else:
            faults.append((place, f"must be a mapping or a tuple {wanted}, got {shown(row)}"))
    if faults:
        refuse(where, faults)
    keys = dict.fromkeys(key for row in rows for key in row)
    with reading(where):
        cells = {key: [row.get(key) for row in rows] for key in keys}
        return RawRows(where, datasets.Dataset.from_dict(cells, on_mixed_types="use_json"))


@checked_call
def from_files(
    train: str | None,
    val: str | None,
    test: str | None,
    *,
    form: Form,
    columns: Given,
    share: Annotated[float, Field(gt=0, lt=0.5)],
    seed: int,
    skip_unusable: bool = False,
) -> Checked:
    """Train, val and test with the columns of ``form``. Prints the columns that it found.

    No text of ``train`` is in two of them.

    The rows are in the cache of ``datasets`` (HF_HOME) and are read from there when they are needed.

    Args:
        train: the training rows; those whose text is in another split's file are left out.
        val: the validation rows; None takes ``share`` of the texts in ``train``.
        test: the test rows; None takes ``share`` of the texts in ``train``.
        form: form of the rows, see :data:`dynrank.app.tasks.data.columns.COLUMNS`.
        columns: {our name of a column: its name in the files, or a list of names, whose texts are joined}; None: a
            usual name.
        share: share of the texts, and of the texts of each class; without classes, whether a text is among them
            depends only on (``seed``, text).
        seed: seed of the splits.
        skip_unusable: leave out the rows that cannot be used, and count them; otherwise they are an error.
    """
    names = {"train": train, "val": val, "test": test}
    parts = dict[str, datasets.Dataset]()
    unusable = dict[str, int]()
    found = Checked()
    for split, name in names.items():
        if split == "train" or name:
            source = Source(name, f"data.{split}", split)
            used = find_columns(source.sample, columns, form, source.where, trained=found.columns or None)
            refuse_unread(columns, used, "data.columns")
            _say_columns(used, found.columns)
            found.columns = found.columns or used.names
            parts[split], unusable[split] = source.read(used, skip=skip_unusable)
    digests = {split: column_of(rows, "digest").to_numpy().view(np.uint64) for split, rows in parts.items()}
    numbers = _numbers(parts["train"], digests["train"], form, seed)
    # The split of each row, in one byte.
    drawn: Any = sum((numbers >= edge).astype(np.int8) for edge in (1 - 2 * share, 1 - share))
    for i, split in enumerate(SPLITS[1:], start=1):
        if split in parts:
            drawn[drawn == i] = 0
            drawn[np.isin(digests["train"], digests[split])] = -1
    rows = parts["train"]
    found.dropped = int((drawn == -1).sum())
    found.unusable = unusable
    for i, split in enumerate(SPLITS):
        found[split] = rows.select(np.flatnonzero(drawn == i)) if i == 0 or split not in parts else parts[split]
        if not len(found[split]):
            twice = f", of which {found.dropped} are also in the other files" if found.dropped else ""
            few = f"data.train={train} has {len(rows)} rows{twice}, which leaves none for {split}"
            raise ConfigurationError(f"{few}; set data.{split} to a file of its own, or data.share")
    return _in_form(found)


def _in_form(found: Checked) -> Checked:
    """``found`` itself without the columns that say more than the form does, after a look for ambiguous texts."""
    for split, rows in found.items():
        if "label" in rows.column_names:
            found.ambiguous = {**found.ambiguous, split: ambiguous_texts(rows)}
        found[split] = rows.remove_columns([name for name in _BESIDE if name in rows.column_names])
    return found


def _numbers(rows: datasets.Dataset, digests: Any, form: Form, seed: int) -> Any:
    """(rows,) random numbers from 0 to below 1, the same for equal texts; those of each class are spread alike."""
    # An odd factor permutes the numbers below 2**64, so each seed draws others.
    numbers = digests * np.uint64(number_of("", seed) | 1)
    if form != "classification":
        return numbers / 2.0**64
    return within_classes(rows, numbers, seed)


def _say_columns(used: Columns, trained: Mapping[str, Theirs]) -> None:
    """Print the columns of the training rows, whose ``trained`` are empty, and those of other rows if they differ."""
    if used.names != trained:
        say({"columns": used})
    if used.unused and not trained:
        say({"not used": ", ".join(used.unused)})
