"""The rows of a task's data by split, from what users may give."""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Any

import datasets
import numpy as np
from datasets.fingerprint import Hasher

from dynrank.errors import ConfigurationError, shown
from dynrank.tasks.data.columns import COLUMNS, SNIFFED, Theirs, find_columns
from dynrank.tasks.data.stored import Rows, of_dataset, usable_rows

SPLITS = ("train", "val", "test")
Pairs = dict[str, list[tuple[str, str]]]


class Checked(dict[str, datasets.Dataset]):
    """{split: its rows}, in the columns of their form and checked.

    Attributes:
        dropped: number of training rows that were left out, because their text is also in another split's file.
        unusable: {split: number of rows of its file that were left out, because they cannot be used}.
        columns: {our name of a column: its name in the training file}.
    """

    dropped: int = 0
    unusable: Mapping[str, int] = MappingProxyType({})
    columns: Mapping[str, Theirs] = MappingProxyType({})


def number_of(key: str, seed: int) -> int:
    """A random whole number below 2**64 that depends only on (``seed``, ``key``)."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8])


def place(key: str, seed: int, train: float, val: float) -> str:
    """The split of ``key``, a text or the name of a group, which depends only on (``seed``, ``key``).

    The share ``train`` of all keys is in the training split, and the share ``val`` in this or the validation split.
    """
    share = number_of(key, seed) / 2**64
    return "train" if share < train else "val" if share < val else "test"


def within_classes(digests: Any, numbers: Any, classes: Any, names: Sequence[str], seed: int) -> Any:
    """(rows,) numbers from 0 to below 1, alike in each class: a share of them is the same share of each class.

    Rows of the same text have the same number, and count once, in the class of the first. No share of the highest
    numbers has all texts of a class.

    Args:
        digests: (rows,) hashes of the texts.
        numbers: (rows,) random numbers of the texts.
        classes: (rows,) the index of each row's class in ``names``.
        names: names of the classes.
        seed: seed of the places where the shares begin; without these, small classes would all lack the same splits.
    """
    _, firsts, text = np.unique(digests, return_index=True, return_inverse=True)
    of_texts = classes[firsts]
    order = np.lexsort((numbers[firsts], of_texts))
    starts = np.flatnonzero(np.diff(of_texts[order], prepend=-1))
    sizes = np.diff(starts, append=len(order))
    offsets = np.array([number_of(names[index], seed) / 2**64 for index in of_texts[order][starts]])
    places = np.arange(len(order)) - np.repeat(starts, sizes)
    found = np.empty(len(order))
    found[order] = (places + np.repeat(offsets, sizes)) / np.repeat(sizes, sizes)
    found[order[starts]] = 0
    return found[text]


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
        rows = of_dataset(part, where)
    else:
        named = [*enumerate((_named(row, form) for row in part), start=1)]
        rows = Rows(where, Hasher.hash(str(named)), lambda: iter(named))
    first = islice(rows.read(), SNIFFED)
    columns = find_columns([row for _, row in first if isinstance(row, Mapping)], {}, form, where, rows.types)
    made, _ = usable_rows(rows, columns)
    return made.remove_columns(["digest", "place"])


def _named(row: Any, form: str) -> Mapping[str, Any] | str:
    names = COLUMNS[form]
    if isinstance(row, Sequence) and not isinstance(row, str) and len(row) == len(names):
        return dict(zip(names, row, strict=True))
    return row if isinstance(row, Mapping) else f"must be {' and '.join(names)}, got {shown(row)}"
