"""Rows of a task's data by split: which split a row falls into, and what users may give."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from dynrank.errors import ConfigurationError
from dynrank.tasks.data.rows import COLUMNS, check_rows, find_columns

__all__ = ["SPLITS", "Pairs", "number_of", "place", "rows_by_split"]

SPLITS = ("train", "val", "test")
Pairs = dict[str, list[tuple[str, str]]]


def number_of(key: str, seed: int) -> int:
    """A whole number below 2**64 that depends on (``seed``, ``key``) alone, evenly spread."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8])


def place(key: str, seed: int, train: float, val: float) -> str:
    """The split of whatever ``key`` names, which depends on (``seed``, ``key``) alone.

    Args:
        key: a text, or the name of what falls into one split as a whole.
        seed: of the splits.
        train: share of all keys that fall into the training split.
        val: share of all that fall into it or into the validation split.
    """
    share = number_of(key, seed) / 2**64
    return "train" if share < train else "val" if share < val else "test"


def rows_by_split(data: Any, form: str) -> dict[str, datasets.Dataset]:
    """The rows of train, val and test with our names of columns (see :data:`dynrank.tasks.data.rows.COLUMNS`).

    Args:
        data: a mapping from ``train``, ``val`` and ``test`` to a ``datasets.Dataset``, or to a list of mappings or of
            tuples in the order of the columns; or a function without arguments that returns such a mapping.
        form: of the rows.

    Raises:
        ConfigurationError: if a split or a column is missing, or a row cannot be used.
    """
    splits: Any = data() if callable(data) else data
    if not isinstance(splits, Mapping) or not splits.keys() >= {*SPLITS}:
        found = sorted(splits) if isinstance(splits, Mapping) else splits
        raise ConfigurationError(f"data must have the splits {[*SPLITS]}, got {found!r:.200}; set data")
    return {split: _rows(splits[split], form, f"data, {split}") for split in SPLITS}


def _rows(part: Any, form: str, where: str) -> datasets.Dataset:
    if not isinstance(part, datasets.Dataset):
        part = _of_list(list(part), form, where)
    columns = find_columns(part.column_names, {}, form, where)
    rows = part.select_columns([*columns.values()])
    rows = rows.rename_columns({theirs: ours for ours, theirs in columns.items() if theirs != ours})
    classes = getattr(rows.features.get("label"), "names", None)  # of a ClassLabel, whose rows are numbers
    if classes is not None:
        names = [classes[i] if i is not None else None for i in rows["label"]]
        rows = rows.remove_columns("label").add_column("label", names)
    check_rows(rows, form, where)
    return rows


def _of_list(rows: list[Any], form: str, where: str) -> datasets.Dataset:
    names = COLUMNS[form]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping) and not (isinstance(row, Sequence) and len(row) == len(names)):
            raise ConfigurationError(f"{where}: row {number} must be {' and '.join(names)}, got {row!r:.200}; set data")
    found = [row if isinstance(row, Mapping) else dict(zip(names, row, strict=True)) for row in rows]
    check_rows(found, form, where)
    try:
        return datasets.Dataset.from_list(found)
    except (TypeError, ValueError) as error:  # Arrow's: a column of two types
        raise ConfigurationError(f"{where}: values of a column must be of one type: {error}; set data") from error
