"""The splits of users' own data: files, folders, or names on the hub. The rows stay on disk."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import datasets
import numpy as np
from pydantic import Field

from dynrank.errors import ConfigurationError, validated_call
from dynrank.tasks.data.columns import Columns, Form, Given, Theirs, find_columns, form_of
from dynrank.tasks.data.source import Source, say
from dynrank.tasks.data.splits import SPLITS, Checked, number_of, within_classes
from dynrank.tasks.data.stored import class_of_rows, column_of


@validated_call("data")
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
    """Train, val and test with the columns of ``form``; no text is in two of them. Prints the columns that it found.

    The rows are in the cache of ``datasets`` (HF_HOME) and are read from there when they are needed.

    Args:
        train: the training rows; those whose text is in another split's file are left out.
        val: the validation rows; None takes ``share`` of the texts in ``train``.
        test: the test rows; None takes ``share`` of the texts in ``train``.
        form: form of the rows, see :data:`dynrank.tasks.data.columns.COLUMNS`.
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
            parts[split], unusable[split], used = _read(name, split, columns, form, skip_unusable)
            found.columns = found.columns or used.names
    digests = {split: column_of(rows, "digest").to_numpy().view(np.uint64) for split, rows in parts.items()}
    numbers = _numbers(parts["train"], digests["train"], form, seed)
    parts = {split: rows.remove_columns(["digest", "place"]) for split, rows in parts.items()}
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
            few = f"data.train={train} has {len(rows)} rows, which leaves none for {split}"
            raise ConfigurationError(f"{few}; set data.{split} to a file of its own, or data.share")
    return found


def from_source(source: Source, forms: Sequence[Form], columns: Mapping[str, Theirs]) -> tuple[datasets.Dataset, Form]:
    """All rows of a source with the columns of the first of ``forms`` that it has, and this form.

    ``columns`` are {our name of a column: its name in the source} where a name is unusual.
    """
    form = form_of(source.sample, forms, columns, source.where)
    rows, _ = source.read(find_columns(source.sample, columns, form, source.where, source.types))
    return rows.remove_columns(["digest", "place"]), form


def _numbers(rows: datasets.Dataset, digests: Any, form: str, seed: int) -> Any:
    """(rows,) random numbers from 0 to below 1, the same for equal texts; those of each class are spread alike."""
    # An odd factor permutes the numbers below 2**64, so each seed draws others.
    numbers = digests * np.uint64(number_of("", seed) | 1)
    if form != "classification":
        return numbers / 2.0**64
    classes = class_of_rows(rows)
    return within_classes(digests, numbers, classes.indices.to_numpy(), classes.dictionary.to_pylist(), seed)


def _read(name: str | None, split: str, given: Given, form: str, skip: bool) -> tuple[datasets.Dataset, int, Columns]:
    source = Source(name, f"data.{split}", split)
    columns = find_columns(source.sample, given, form, source.where, source.types)
    if split == "train":
        say({"columns": columns})
        if columns.unused:
            say({"not used": ", ".join(columns.unused)})
    return *source.read(columns, skip=skip), columns
