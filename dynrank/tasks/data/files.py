"""Files of a user's own: csv, tsv, json, jsonl and parquet."""

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
_Share = Annotated[float, Field(ge=0, lt=0.5)]


@validated_call("data")
def from_files(
    train: str | None,
    val: str | None,
    test: str | None,
    *,
    columns: Mapping[str, str],
    val_share: _Share,
    test_share: _Share,
    seed: int,
) -> dict[str, datasets.Dataset]:
    """Train, val and test with the columns text and label, or prompt and answer; no text stands in two of them.

    Args:
        train: file of the training rows; those whose text is in another split's file are left out.
        val: file of the validation rows; None: ``val_share`` of the texts in ``train``.
        test: file of the test rows; None: ``test_share`` of the texts in ``train``.
        columns: how the columns text, label, prompt and answer are called in the files.
        val_share: of texts, chosen by (``seed``, text) alone.
        test_share: of texts, chosen in the same way.
        seed: of the splits.

    Raises:
        ConfigurationError: if a file cannot be read.
    """
    files = {"train": train, "val": val, "test": test}
    parts = {split: _read(file, split, columns) for split, file in files.items() if file or split == "train"}
    elsewhere = {text for split in parts if split != "train" for text in _texts(parts[split])}
    rows: dict[str, list[int]] = {split: [] for split in SPLITS}
    for number, text in enumerate(_texts(parts["train"])):
        split = place(str(text), seed, 1 - val_share - test_share, 1 - test_share)
        if text not in elsewhere:
            rows["train" if split in parts else split].append(number)
    drawn = {split: parts["train"].select(rows[split]) for split in SPLITS if not files[split] or split == "train"}
    return {**parts, **drawn}


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
    renamed = {theirs: ours for ours, theirs in columns.items() if theirs in rows.column_names and theirs != ours}
    return rows.rename_columns(renamed)


def _texts(rows: datasets.Dataset) -> list[Any]:
    """The column that says which row is which."""
    name = next((name for name in ("text", "prompt") if name in rows.column_names), rows.column_names[0])
    return list(rows[name])
