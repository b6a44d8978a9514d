"""The rows of a task's data by split, from what users may give."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
from datasets.fingerprint import Hasher

from dynrank.errors import ConfigurationError, shown
from dynrank.tasks.data.cache import READ, filling, processes
from dynrank.tasks.data.columns import COLUMNS, SNIFFED, Columns, find_columns
from dynrank.tasks.data.rows import check_rows, features_of, read_rows

SPLITS = ("train", "val", "test")
Pairs = dict[str, list[tuple[str, str]]]


class Checked(dict[str, datasets.Dataset]):
    """{split: its rows}, in the columns of their form and checked.

    Attributes:
        dropped: number of training rows that were left out, because their text is also in another split's file.
    """

    dropped: int = 0


def number_of(key: str, seed: int) -> int:
    """A random whole number below 2**64 that depends only on (``seed``, ``key``)."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8])


def place(key: str, seed: int, train: float, val: float) -> str:
    """The split of ``key``, a text or the name of a group, which depends only on (``seed``, ``key``).

    The share ``train`` of all keys is in the training split, and the share ``val`` in this or the validation split.
    """
    share = number_of(key, seed) / 2**64
    return "train" if share < train else "val" if share < val else "test"


def rows_by_split(data: Any, form: str) -> Checked:
    """The rows of train, val and test with our names of columns (see :data:`dynrank.tasks.data.columns.COLUMNS`).

    Args:
        data: a mapping from ``train``, ``val`` and ``test`` to a ``datasets.Dataset``, or to a list of mappings or of
            tuples in the order of the columns; or a function without arguments that returns such a mapping.
        form: form of the rows.
    """
    splits: Any = data() if callable(data) else data
    if isinstance(splits, Checked):
        return splits
    if not isinstance(splits, Mapping) or not splits.keys() >= {*SPLITS}:
        found = sorted(splits) if isinstance(splits, Mapping) else shown(splits)
        raise ConfigurationError(f"data must have the splits {[*SPLITS]}, got {found}; set data")
    return Checked({split: _rows(splits[split], form, f"data, {split}") for split in SPLITS})


def _rows(part: Any, form: str, where: str) -> datasets.Dataset:
    if not len(part):
        raise ConfigurationError(f"{where} has 0 rows; set data")
    if isinstance(part, datasets.Dataset):
        columns = find_columns(sample_of(part), {}, form, where, part.features)
        return read_dataset(part, columns, where).remove_columns(["digest", "place"])
    rows = [_named(row, form) for row in part]
    columns = find_columns([row for row in rows if isinstance(row, Mapping)], {}, form, where)
    made = datasets.Dataset.from_dict(read_rows(range(1, len(rows) + 1), rows, columns), features_of(columns))
    return check_rows(made, where, "row").remove_columns(["digest", "place"])


def _named(row: Any, form: str) -> Mapping[str, Any] | str:
    names = COLUMNS[form]
    if isinstance(row, Sequence) and not isinstance(row, str) and len(row) == len(names):
        return dict(zip(names, row, strict=True))
    return row if isinstance(row, Mapping) else f"must be {' and '.join(names)}, got {shown(row)}"


def sample_of(rows: datasets.Dataset) -> list[dict[str, Any]]:
    """The first rows; pictures and sounds in them are not decoded."""
    found: list[dict[str, Any]] = rows.with_format("arrow")[:SNIFFED].to_pylist()
    return found


def read_dataset(rows: datasets.Dataset, columns: Columns, where: str) -> datasets.Dataset:
    """The rows of a data set, as :func:`dynrank.tasks.data.rows.read_rows` makes them, without faults."""
    names = [*columns.names.values()]
    with filling():
        made = rows.select_columns(names).map(
            _read_batch,
            batched=True,
            with_indices=True,
            fn_kwargs={"columns": columns},
            remove_columns=names,
            features=features_of(columns),
            keep_in_memory=not rows.cache_files,
            new_fingerprint=Hasher.hash(str((READ, rows._fingerprint, columns))),
            num_proc=processes(len(rows)),
            desc="checking",
        )
    return check_rows(made, where, "row")


def _read_batch(batch: Mapping[str, list[Any]], indices: list[int], columns: Columns) -> dict[str, list[Any]]:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    return read_rows([index + 1 for index in indices], rows, columns)
