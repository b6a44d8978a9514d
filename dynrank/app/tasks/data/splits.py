"""The rows of a task's data by split: of files and names on the hub, or of what a function returns."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any

import datasets
from pydantic import Field

from dynrank.app.keys import named
from dynrank.app.tasks.data.columns import COLUMNS, Form, Given, Theirs, find_columns
from dynrank.app.tasks.data.source import read_source
from dynrank.app.tasks.data.stored import RawRows, reading, refuse, usable_rows
from dynrank.errors import ConfigurationError, checked_call, shown

SPLITS = ("train", "val", "test")
Pairs = dict[str, list[tuple[str, str]]]


class Checked(dict[str, datasets.Dataset]):
    """{split: its rows}, in the columns of their form and checked.

    Attributes:
        dropped: number of training rows that were left out, because their text is also in another split's file.
        unusable: {split: number of rows of its file that were left out, because they cannot be used}.
        columns: {our name of a column: its name in the training rows}.
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


def labels_of(rows: datasets.Dataset) -> Iterable[list[str]]:
    """The labels of each row, of which it may have one, or a list."""
    return (label if isinstance(label, list) else [label] for label in rows["label"])


def rows_by_split(data: Any, form: Form) -> Checked:
    """The rows of train, val and test with our names of columns (see :data:`dynrank.app.tasks.data.columns.COLUMNS`).

    Args:
        data: a mapping from ``train``, ``val`` and ``test`` to a ``datasets.Dataset``, or to a list of mappings or of
            tuples in the order of the columns; or a function without arguments that returns such a mapping.
        form: form of the rows.
    """
    with named("data.{}".format):
        splits: Any = data() if callable(data) else data
    if isinstance(splits, Checked):
        return splits
    if not isinstance(splits, Mapping) or not splits.keys() >= {*SPLITS}:
        got = sorted(splits) if isinstance(splits, Mapping) else shown(splits)
        raise ConfigurationError(f"data must have the splits {[*SPLITS]}, got {got}; set data")
    found = Checked()
    for split in SPLITS:
        raw = _raw(splits[split], form, f"data, {split}")
        used = find_columns(raw.rows.column_names, {}, form, raw.where)
        rows, _ = usable_rows(raw, used)
        found[split] = rows.remove_columns("place")
        if split == "train":
            found.columns = used.names
    return found


def _raw(part: Any, form: Form, where: str) -> RawRows:
    """The rows of a data set, or of a list of mappings or tuples."""
    if not isinstance(part, Sequence | datasets.Dataset) or not len(part):
        raise ConfigurationError(f"{where} must be a list of rows or a datasets.Dataset, got {shown(part)}; set data")
    if isinstance(part, datasets.Dataset):
        return RawRows(where, part)
    names = COLUMNS[form]
    faults = [
        (number, f"it must be a mapping or a tuple {names}, got {shown(row)}")
        for number, row in enumerate(part, start=1)
        if not isinstance(row, Mapping) and not (isinstance(row, tuple | list) and len(row) == len(names))
    ]
    if faults:
        refuse(where, faults)
    rows = [row if isinstance(row, Mapping) else dict(zip(names, row, strict=True)) for row in part]
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
    """Train, val and test with the columns of ``form``.

    No text of ``train`` is in two of them. Each label has a training text.

    The rows are in the cache of ``datasets`` (HF_HOME) and are read from there when they are needed.

    Args:
        train: the training rows; those whose text is in another split's file are left out.
        val: the validation rows; None takes ``share`` of the texts in ``train``.
        test: the test rows; None takes ``share`` of the texts in ``train``.
        form: form of the rows, see :data:`dynrank.app.tasks.data.columns.COLUMNS`.
        columns: {our name of a column: its name in the files, or a list of names, whose texts are joined}; None: our
            own name.
        share: share of the texts; whether a text is among them depends only on (``seed``, text), but a label that would
            have no training text gets one.
        seed: seed of the splits.
        skip_unusable: leave out the rows that cannot be used, and count them; otherwise they are an error.
    """
    found = Checked()
    unusable = {}
    for split, name in (("train", train), ("val", val), ("test", test)):
        if split == "train" or name:
            raw = read_source(name, f"data.{split}", split)
            used = find_columns(raw.rows.column_names, columns, form, raw.where)
            rows, unusable[split] = usable_rows(raw, used, skip=skip_unusable)
            found[split] = rows.remove_columns("place")
            found.columns = found.columns or used.names
    found.unusable = unusable
    whole = found["train"]
    # A chat is known by all of its turns.
    texts = [str(text) for text in whole[COLUMNS[form][0]]]
    elsewhere = {str(text) for split in SPLITS[1:] if split in found for text in found[split][COLUMNS[form][0]]}
    places = {text: place(text, seed, 1 - 2 * share, 1 - share) for text in texts if text not in elsewhere}
    # A split with a file of its own takes no text.
    places = {text: "train" if split in found else split for text, split in places.items()}
    if form == "classification":
        _train_each_label(places, zip(texts, labels_of(whole), strict=True), seed)
    found.dropped = sum(text in elsewhere for text in texts)
    for split in SPLITS:
        if split == "train" or split not in found:
            found[split] = whole.select([i for i, text in enumerate(texts) if places.get(text) == split])
        if not len(found[split]):
            twice = f", of which {found.dropped} are also in the other files" if found.dropped else ""
            few = f"data.train={train} has {len(whole)} rows{twice}, which leaves none for {split}"
            raise ConfigurationError(f"{few}; set data.{split} to a file of its own, or data.share")
    return found


def _train_each_label(places: dict[str, str], pairs: Iterable[tuple[str, list[str]]], seed: int) -> None:
    """Move to training, of each label that has no text there, the text with the lowest number.

    ``places`` are {text: its split}, and ``pairs`` the rows' texts and labels.
    """
    texts: dict[str, set[str]] = defaultdict(set)
    for text, labels in pairs:
        for label in labels if text in places else ():
            texts[label].add(text)
    for _, own in sorted(texts.items()):
        if all(places[text] != "train" for text in own):
            places[min(own, key=lambda text: number_of(text, seed))] = "train"
