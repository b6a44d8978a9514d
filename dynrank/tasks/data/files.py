"""A user's own files: csv, tsv, json, jsonl, parquet and txt; a folder or a name on the hub. They stay on the disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import datasets
import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from pydantic import Field

from dynrank.errors import ConfigurationError, validated_call
from dynrank.tasks.data.rows import COLUMNS, Form, bars_on_terminals, check_rows, each, find_columns, form_of
from dynrank.tasks.data.splits import SPLITS, number_of

_READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
_OPTIONS: dict[str, dict[str, Any]] = {".tsv": {"sep": "\t"}, ".txt": {"sample_by": "paragraph"}}
_THEIR_SPLITS = {"train": "train", "val": "validation", "test": "test"}  # in folders, and on the hub


@validated_call("data")
def from_files(
    train: str | None,
    val: str | None,
    test: str | None,
    *,
    form: Form,
    columns: Mapping[str, str | None],
    share: Annotated[float, Field(gt=0, lt=0.5)],
    seed: int,
) -> dict[str, datasets.Dataset]:
    """Train, val and test with the columns of ``form``; no text stands in two of them. What was found is printed.

    The rows lie in the cache of ``datasets`` (HF_HOME) and are read from there when they are needed.

    Args:
        train: the training rows; those whose text is in another split's file are left out.
        val: the validation rows; None takes ``share`` of the texts in ``train``.
        test: the test rows; None takes ``share`` of the texts in ``train``.
        form: of the rows, see :data:`dynrank.tasks.data.rows.COLUMNS`.
        columns: how the columns are called in the files; None: as usual.
        share: of the texts, chosen by (``seed``, text) alone.
        seed: of the splits.

    Raises:
        ConfigurationError: if a file cannot be read, or a row cannot be used.
    """
    parts: dict[str, datasets.Dataset] = {}
    for split, name in (("train", train), ("val", val), ("test", test)):
        if split == "train" or name is not None:
            key = f"data.{split}"
            rows = _read(name, key, split)
            found = find_columns(rows.column_names, columns, form, f"{key}={name}")
            parts[split] = _usable(rows, found, form, name, key)
            if split == "train":
                _say("columns         ", ", ".join(f"{ours} <- {theirs}" for ours, theirs in found.items()))
                _check_labels(parts[split], f"{key}={name}")
    numbers = {split: _numbers(part, COLUMNS[form][0], seed) for split, part in parts.items()}
    rows = parts["train"]
    edges = [np.uint64((1 - 2 * share) * 2**64), np.uint64((1 - share) * 2**64)]
    drawn: Any = sum((numbers["train"] >= edge).astype(np.int8) for edge in edges)  # of each row, in few bytes
    for i, split in enumerate(SPLITS[1:], start=1):
        if split in parts:
            drawn[drawn == i] = 0
            drawn[_among(numbers["train"], numbers[split])] = -1
    for i, split in enumerate(SPLITS):
        if i == 0 or split not in parts:
            parts[split] = rows.select(np.flatnonzero(drawn == i))
        if not len(parts[split]):
            raise ConfigurationError(f"data.train={train} leaves no rows for {split}; set data.{split} or data.share")
    return parts


def from_file(name: str, key: str, forms: Sequence[Form]) -> tuple[datasets.Dataset, Form]:
    """All rows of one file, with the columns of the first of ``forms`` that it has by their usual names; that form.

    Args:
        name: of the file; a folder or a name on the hub stands for its training rows.
        key: where the user wrote it.
        forms: that can be used.

    Raises:
        ConfigurationError: if it cannot be read, has the columns of none of them, or a row cannot be used.
    """
    rows = _read(name, key, "train")
    form, found = form_of(rows.column_names, forms, f"{key}={name}")
    return _usable(rows, found, form, name, key), form


def _usable(
    rows: datasets.Dataset, found: Mapping[str, str], form: Form, name: str | None, key: str
) -> datasets.Dataset:
    """The columns ``found``, by our names, of rows that are all as ``form`` has them."""
    rows = rows.select_columns([*found.values()])
    rows = rows.rename_columns({theirs: ours for ours, theirs in found.items() if theirs != ours})
    if rows.features.get("label") == datasets.Value("float64"):  # ints, of which a csv file lacks some
        with suppress(ValueError):
            rows = rows.cast_column("label", datasets.Value("int64"))
    try:
        check_rows(rows, form, f"{key}={name}")
    except UnicodeDecodeError as error:  # in a JSON text, which Arrow looks at no sooner
        raise _unreadable(name, key, error) from error
    return rows


@rank_zero_only
def _say(*words: str) -> None:
    print(*words)


def _read(name: str | None, key: str, split: str) -> datasets.Dataset:
    path = Path(name or "").expanduser()
    hub = name is not None and name.count("/") == 1 and not path.exists() and not path.suffix
    if not hub and not path.is_dir() and not (path.is_file() and path.suffix in _READERS) or name in (None, ""):
        raise ConfigurationError(
            f"{key} must be a file of {[*_READERS]}, a folder or ORG/NAME on the hub, got {name!r}; set {key}"
        )
    bars_on_terminals()
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs in its own words what is raised here
    try:
        if hub or path.is_dir():
            return datasets.load_dataset(str(name if hub else path), split=_THEIR_SPLITS[split])
        options = _OPTIONS.get(path.suffix, {})
        return datasets.load_dataset(_READERS[path.suffix], data_files=str(path), split="train", **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise _unreadable(name, key, error) from error
    finally:
        datasets.logging.set_verbosity(verbosity)


def _unreadable(name: str | None, key: str, error: Exception) -> ConfigurationError:
    path = Path(name or "").expanduser()
    fault = (_first_fault(path) if path.is_file() else None) or error.__cause__ or error
    return ConfigurationError(f"{key}={name} cannot be read: {' '.join(str(fault).split())}; set {key}")


def _first_fault(path: Path) -> str | None:
    """The first line that is not UTF-8, or no JSON in a file of JSON; None where the fault is of another kind."""
    if path.suffix == ".parquet":
        return None
    if not path.stat().st_size:
        return "it is empty"
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode()
                if path.suffix == ".jsonl" and text.strip():
                    json.loads(text)
            except ValueError as error:  # of both kinds
                return (
                    f"line {number} is {'not UTF-8' if isinstance(error, UnicodeDecodeError) else 'no JSON'}: {error}"
                )
    if number == 1 and path.suffix in (".csv", ".tsv"):
        return "it has 0 rows"
    try:
        json.loads(path.read_text(encoding="utf-8") if path.suffix == ".json" else "0")
    except ValueError as error:
        return f"it is no JSON: {error}"  # which says the line
    return None


def _check_labels(rows: datasets.Dataset, where: str) -> None:
    """Refuse a label of a single row: either nothing is learned of it, or nothing is known of how well."""
    if "label" not in rows.column_names:
        return
    first: dict[Any, int] = {}
    again = set()
    for number, row in enumerate(each(rows.select_columns("label")), start=1):
        for label in row["label"] if isinstance(row["label"], list) else [row["label"]]:
            again |= {label} if label in first else set()
            first.setdefault(label, number)
    for label, number in first.items():
        if label not in again:
            raise ConfigurationError(f"{where}: row {number} alone has the label {label!r}; add rows, or take it out")


def _among(values: np.ndarray[Any, Any], others: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Whether each of ``values`` is one of ``others``; a part at a time, since numpy takes many times its memory."""
    parts = np.array_split(values, 1 + len(values) // 2**20)
    return np.concatenate([np.isin(part, others) for part in parts])


def _numbers(rows: datasets.Dataset, column: str, seed: int) -> np.ndarray[Any, Any]:
    """A number of each row's text, equal for equal texts, evenly spread over those below 2**64."""
    found = np.empty(len(rows), np.uint64)
    for i, row in enumerate(each(rows.select_columns(column))):
        key = row[column] if isinstance(row[column], str) else json.dumps(row[column])
        found[i] = number_of(key, seed)
    return found
