"""The rows of a task's data by split: of files and names on the hub, or of what a function returns."""

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any

import datasets
from pydantic import Field

from dynrank.app.keys import named
from dynrank.app.tasks.data.columns import COLUMNS, Form, Given, Theirs, find_columns
from dynrank.app.tasks.data.rows import usable_rows
from dynrank.app.tasks.data.source import RawRows, read_source, reading
from dynrank.errors import ConfigurationError, checked_call, shown

SPLITS = ("train", "val", "test")
# {split: rows of a function of Python}.
Rows = dict[str, list[dict[str, Any]]]


class Checked(dict[str, datasets.Dataset]):
    """{split: its rows}, in the columns of their form and checked.

    Attributes:
        columns: {our name of a column: its name in the training rows}.
        left_out: {split: {reason: number of rows of its file that were left out}}.
    """

    def __init__(self) -> None:
        super().__init__()
        self.columns: Mapping[str, Theirs] = {}
        self.left_out = {split: {"unusable": 0, "in_another_split": 0} for split in SPLITS}


def number_of(key: str, seed: int) -> int:
    """A random whole number below 2**64 that depends only on (``seed``, ``key``)."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8])


def place(key: str, seed: int, train: float, val: float) -> str:
    """The split of ``key``, a text or the name of a group, which depends only on (``seed``, ``key``).

    The share ``train`` of all keys is in the training split, and the share ``val`` in this or the validation split.
    """
    share = number_of(key, seed) / 2**64
    return "train" if share < train else "val" if share < val else "test"


def rows_by_split(data: Any, form: Form) -> Checked:
    """The rows of train, val and test with our names of columns (see :data:`dynrank.app.tasks.data.columns.COLUMNS`).

    Args:
        data: a mapping from ``train``, ``val`` and ``test`` to a ``datasets.Dataset`` or a list of mappings; or a
            function without arguments that returns such a mapping.
        form: form of the rows.
    """
    with named("data.{}".format):
        splits: Any = data() if callable(data) else data
    if isinstance(splits, Checked):
        return splits
    if not isinstance(splits, Mapping) or not splits.keys() >= {*SPLITS}:
        got = sorted(splits) if isinstance(splits, Mapping) else shown(splits)
        raise ConfigurationError(f"data must have the splits {[*SPLITS]}, got {got}; set data")
    found = dict[str, RawRows]()
    for split in SPLITS:
        rows = splits[split]
        where = f"data, {split}"
        if not isinstance(rows, datasets.Dataset):
            if not isinstance(rows, list) or not rows or not all(isinstance(row, Mapping) for row in rows):
                must = "must be a datasets.Dataset or a list of mappings, which name the columns"
                raise ConfigurationError(f"{where} {must}, got {shown(rows)}; set data")
            with reading(where):
                rows = datasets.Dataset.from_list(rows)
        found[split] = RawRows(where, rows)
    return _checked(found, form, {}, skip=False)


def _checked(parts: Mapping[str, RawRows], form: Form, given: Given, *, skip: bool) -> Checked:
    found = Checked()
    for split, raw in parts.items():
        names = find_columns(raw.rows.column_names, given, form, raw.where)
        found[split], found.left_out[split]["unusable"] = usable_rows(raw, names, skip=skip)
        found.columns = found.columns or names
    return found


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
    files = {"train": train, "val": val, "test": test}
    parts = {
        split: read_source(name, f"data.{split}", split) for split, name in files.items() if name or split == "train"
    }
    found = _checked(parts, form, columns, skip=skip_unusable)
    whole = found["train"]
    # A chat is known by all of its turns.
    texts = [str(text) for text in whole[COLUMNS[form][0]]]
    elsewhere = {str(text) for split in SPLITS[1:] if split in found for text in found[split][COLUMNS[form][0]]}
    places = {text: place(text, seed, 1 - 2 * share, 1 - share) for text in texts if text not in elsewhere}
    # A split with a file of its own takes no text.
    places = {text: "train" if split in found else split for text, split in places.items()}
    if form == "classification":
        # Of each label the text with the lowest number is trained; those of training have the lowest.
        pairs = [pair for pair in zip(whole["label"], texts, strict=True) if pair[1] in places]
        pairs.sort(key=lambda pair: number_of(pair[1], seed), reverse=True)
        places |= dict.fromkeys(dict(pairs).values(), "train")
    twice = sum(text in elsewhere for text in texts)
    found.left_out["train"]["in_another_split"] = twice
    for split in SPLITS:
        if split == "train" or split not in found:
            found[split] = whole.select([i for i, text in enumerate(texts) if places.get(text) == split])
        if not len(found[split]):
            same = f", of which {twice} are also in the other files" if twice else ""
            few = f"data.train={train} has {len(whole)} rows{same}, which leaves none for {split}"
            raise ConfigurationError(f"{few}; set data.{split} to a file of its own, or data.share")
    return found
