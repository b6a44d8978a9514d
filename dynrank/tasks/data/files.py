"""A user's own files: csv, tsv, json, jsonl and parquet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import datasets
from pydantic import Field

from dynrank.errors import ConfigurationError, validated_call
from dynrank.tasks.data.splits import SPLITS, place

_READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@validated_call("data")
def from_files(
    train: str | None,
    val: str | None,
    test: str | None,
    *,
    columns: Mapping[str, str],
    share: Annotated[float, Field(gt=0, lt=0.5)],
    seed: int,
) -> dict[str, datasets.Dataset]:
    """Train, val and test with the columns text and label, or prompt and answer; no text stands in two of them.

    Args:
        train: file of the training rows; those whose text is in another split's file are left out.
        val: file of the validation rows; None takes ``share`` of the texts in ``train``.
        test: file of the test rows; None takes ``share`` of the texts in ``train``.
        columns: how the columns text, label, prompt and answer are called in the files.
        share: of the texts, chosen by (``seed``, text) alone.
        seed: of the splits.

    Raises:
        ConfigurationError: if a file cannot be read.
    """
    given = {split: _read(file, split, columns) for split, file in (("val", val), ("test", test)) if file is not None}
    rows = _read(train, "train", columns)
    key = next((name for name in ("text", "prompt") if name in rows.column_names), rows.column_names[0])
    elsewhere = {text for part in given.values() for text in part[key]}
    numbers: dict[str, list[int]] = {split: [] for split in SPLITS}
    for number, text in enumerate(rows[key]):
        split = place(str(text), seed, 1 - 2 * share, 1 - share)
        if text not in elsewhere:
            numbers["train" if split in given else split].append(number)
    return {split: rows.select(numbers[split]) for split in SPLITS} | given


def _read(file: str | None, split: str, columns: Mapping[str, str]) -> datasets.Dataset:
    path = Path(file or "").expanduser()
    reader = _READERS.get(path.suffix)
    if reader is None or not path.is_file():
        raise ConfigurationError(f"data.{split} must be a file of {[*_READERS]}, got {file!r}; set data.{split}")
    options: dict[str, Any] = {"sep": "\t"} if path.suffix == ".tsv" else {}
    datasets.disable_progress_bars()
    try:
        with TemporaryDirectory() as cache:  # the rows stay in memory, and nothing is left in the user's home
            options |= {"cache_dir": cache, "keep_in_memory": True}
            rows: Any = datasets.load_dataset(reader, data_files=str(path), split="train", **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ConfigurationError(f"data.{split}={file} cannot be read: {error.__cause__ or error}") from error
    return rows.rename_columns({theirs: ours for ours, theirs in columns.items() if theirs in rows.column_names})
