"""Rows of a task's data by split: which split a row falls into, and what users may give."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from dynrank.errors import ConfigurationError

__all__ = ["SPLITS", "Pairs", "pairs_by_split", "place"]

SPLITS = ("train", "val", "test")
Pairs = dict[str, list[tuple[str, str]]]


def place(key: str, seed: int, train: float, val: float) -> str:
    """The split of whatever ``key`` names, which depends on (``seed``, ``key``) alone.

    Args:
        key: a text, or the name of what falls into one split as a whole.
        seed: of the splits.
        train: share of all keys that fall into the training split.
        val: share of all that fall into it or into the validation split.
    """
    share = int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8]) / 2**64
    return "train" if share < train else "val" if share < val else "test"


def pairs_by_split(data: Any, columns: tuple[str, str], kind: Any) -> dict[str, list[tuple[str, Any]]]:
    """The rows of train, val and test as pairs of a text and what belongs to it.

    Args:
        data: a mapping from ``train``, ``val`` and ``test`` to a ``datasets.Dataset`` or to a list of pairs, or a
            function without arguments that returns such a mapping.
        columns: names of the two columns of a ``datasets.Dataset``.
        kind: type, or types, of what belongs to a text.

    Raises:
        ConfigurationError: if a split or a column is missing, or a row cannot be used.
    """
    splits: Any = data() if callable(data) else data
    if not isinstance(splits, Mapping) or not splits.keys() >= {*SPLITS}:
        found = sorted(splits) if isinstance(splits, Mapping) else splits
        raise ConfigurationError(f"data must have the splits {[*SPLITS]}, got {found!r:.200}; set data")
    pairs = {split: _pairs(splits[split], columns) for split in SPLITS}
    for split, rows in pairs.items():
        wrong = [row for row in rows or ["no row"] if not _is_pair(row, kind)]
        if wrong:
            wanted = f"a {columns[0]} (str) and its {columns[1]} ({getattr(kind, '__name__', kind)})"
            raise ConfigurationError(f"rows of {split} must be {wanted}, got {wrong[0]!r:.200}; set data")
    return pairs


def _pairs(part: Any, columns: Sequence[str]) -> list[Any]:
    names = getattr(part, "column_names", None)
    if names is None:
        return list(part)
    if not {*columns} <= {*names}:
        raise ConfigurationError(f"data must have the columns {[*columns]}, got {names}; rename them, or set data")
    classes = getattr(part.features[columns[1]], "names", None)  # of a ClassLabel, whose rows are numbers
    texts, others = (part[name] for name in columns)
    return list(zip(texts, others if classes is None else [classes[i] for i in others], strict=True))


def _is_pair(row: Any, kind: Any) -> bool:
    return isinstance(row, tuple | list) and len(row) == 2 and isinstance(row[0], str) and isinstance(row[1], kind)
