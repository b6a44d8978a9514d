"""Reading the rows of a source that a user names, by ``datasets``: a file, a folder, or a data set on the hub."""

import csv
import json
import re
from collections.abc import Callable
from glob import escape
from pathlib import Path
from typing import Any

import datasets
import pandas
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.fingerprint import Hasher
from huggingface_hub import constants

from dynrank.app.hub import hub_answers
from dynrank.app.tasks.data.columns import SNIFFED, Columns
from dynrank.app.tasks.data.headings import heading_of
from dynrank.app.tasks.data.stored import RawRows, quiet, reading, say, usable_rows
from dynrank.errors import ConfigurationError

# The names of splits in folders and on the hub.
_THEIR_SPLITS = {"train": "train", "val": "validation", "test": "test"}
# Columns that no form reads, and that are not decoded.
_UNREAD = (datasets.Image, datasets.Audio, datasets.Video)


class Source:
    """The rows that a name stands for.

    Args:
        name: name of a file, a folder or a data set on the hub.
        key: the key or option that holds the name, for errors.
        split: train, val or test, if the folder or the data set has splits.

    Attributes:
        where: the name of the source in errors.
        parts: the rows of each file.
        sample: the first rows of each file.
    """

    def __init__(self, name: str | None, key: str, split: str) -> None:
        kinds = f"a file ({', '.join(READERS)})"
        kinds += ", a folder, or ORG/NAME on the hub" if key.startswith("data.") else ""
        if not name:
            raise ConfigurationError(f"{key} is not set; set {key} to your rows: {kinds}")
        self.where = f"{key}={name}"
        path = Path(name).expanduser()
        with reading(self.where):
            # A version is no suffix: teknium/OpenHermes-2.5.
            on_hub = name.count("/") == 1 and not path.exists() and not path.suffix[1:2].isalpha()
            if not on_hub and not path.exists():
                raise ConfigurationError(f"{self.where} does not exist; set {key} to {kinds}")
            if path.is_file() and path.suffix.lower() not in READERS:
                raise ConfigurationError(f"{key} must be {kinds}, got {name!r}; set {key}")
            if on_hub:
                self.parts = [RawRows(self.where, _from_hub(name, _THEIR_SPLITS[split]))]
            elif path.is_file():
                self.parts = [_from_file(path, self.where)]
            else:
                files = _files_in(path, _THEIR_SPLITS[split])
                self.parts = [_from_file(file, f"{self.where}, {file}") for file in files]
        # A later file may have a column that the first one lacks.
        self.sample = [row for part in self.parts for row in first_rows(part.rows)]
        if not self.sample:
            raise ConfigurationError(f"{self.where} has 0 rows; correct it")

    def read(self, columns: Columns, *, skip: bool = False) -> tuple[datasets.Dataset, int]:
        """All rows and the number of those left out, by :func:`dynrank.app.tasks.data.stored.usable_rows`."""
        made = [usable_rows(part, columns, skip=skip) for part in self.parts]
        unusable = sum(count for _, count in made)
        if len(made) == 1:
            return made[0][0], unusable
        together = datasets.concatenate_datasets([rows for rows, _ in made])
        # Without this line, datasets would draw a random fingerprint each time.
        together._fingerprint = Hasher.hash(str([rows._fingerprint for rows, _ in made]))
        return together, unusable


def first_rows(rows: datasets.Dataset) -> list[dict[str, Any]]:
    """The rows by which columns are found, without pictures and sounds."""
    pictures = [name for name, kind in rows.features.items() if isinstance(kind, _UNREAD)]
    found: list[dict[str, Any]] = rows.remove_columns(pictures).select(range(min(SNIFFED, len(rows)))).to_list()
    return found


def _from_file(path: Path, where: str) -> RawRows:
    say({"reading": f"{path}, {path.stat().st_size / 1e6:,.1f} MB"})
    suffix = path.suffix.lower()
    builder, options = READERS[suffix]
    rows = _loaded(builder, path, **options(path))
    if suffix in _CLEANED:
        rows = rows.map(_CLEANED[suffix])
    if builder == "csv":
        names = {name: (_unquoted(name) if suffix == ".tsv" else name).strip() for name in rows.column_names}
        rows = rows.rename_columns({name: ours for name, ours in names.items() if name != ours})
    return RawRows(where, rows, first=2 if builder == "csv" else 1)


def _loaded(builder: str, path: Path, **options: Any) -> datasets.Dataset:
    with quiet():
        return datasets.load_dataset(builder, data_files=[escape(str(path.resolve()))], split="train", **options)


def _cells(path: Path) -> dict[str, Any]:
    """How pandas reads a table: cells are texts as they stand there; in a tsv file, each line is a row."""
    _, delimiter, ours = heading_of(path)
    how: dict[str, Any] = {"sep": delimiter, "keep_default_na": False, "encoding": "utf-8-sig"}
    if path.suffix.lower() == ".tsv":
        how["quoting"] = csv.QUOTE_NONE
    first = pandas.read_csv(path, nrows=1, dtype=str, **how)
    # pandas gives the second of two such columns another name.
    if twice := next((name for name in ours if name and ours.count(name) > 1), None):
        raise ValueError(f"it has two columns {twice!r}")
    # Then pandas would take the first cells for names of rows.
    if not isinstance(first.index, pandas.RangeIndex):
        raise ValueError(f"row 2 has more cells than the heading: a text that holds {how['sep']!r} belongs in quotes")
    texts = datasets.Features(dict.fromkeys(first.columns, datasets.Value("string")))
    return {**how, "features": texts}


def _unquoted_row(row: dict[str, str]) -> dict[str, str]:
    return {name: _unquoted(cell) for name, cell in row.items()}


def _unquoted(cell: str) -> str:
    """A cell without quotes around the whole of it."""
    whole = re.fullmatch(r'"((?:[^"]|"")*)"', cell)
    return whole[1].replace('""', '"') if whole else cell


def _list_in_document(path: Path) -> dict[str, Any]:
    """Where the list of rows is, if a json file is one object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        # It has lines, or datasets will say what is wrong.
        return {}
    if not isinstance(found, dict):
        return {}
    lists = [name for name, value in found.items() if isinstance(value, list)]
    if len(lists) != 1:
        raise ValueError("it has no list of rows, or several: write [{...}, {...}], or each row in a line of its own")
    return {"field": lists[0]}


def _no_options(path: Path) -> dict[str, Any]:
    return {}


def _paragraphs(path: Path) -> dict[str, Any]:
    return {"sample_by": "paragraph", "encoding": "utf-8-sig"}


def _within_blank_lines(row: dict[str, str]) -> dict[str, str]:
    return {"text": row["text"].strip("\n")}


# {the end of a file's name: what is done with each row that datasets has read}.
_CLEANED: dict[str, Callable[[dict[str, str]], dict[str, str]]] = {".tsv": _unquoted_row, ".txt": _within_blank_lines}


# {the end of a file's name: (the reader of datasets, its options by the file)}.
READERS: dict[str, tuple[str, Callable[[Path], dict[str, Any]]]] = {
    **dict.fromkeys((".csv", ".tsv"), ("csv", _cells)),
    **dict.fromkeys((".jsonl", ".ndjson"), ("json", _no_options)),
    ".json": ("json", _list_in_document),
    ".parquet": ("parquet", _no_options),
    ".txt": ("text", _paragraphs),
}


def _files_in(folder: Path, split: str) -> list[Path]:
    """The files of a split in a folder, by the rules of ``datasets``."""
    base = escape(str(folder.resolve()))
    found = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
    files = [Path(name) for name in found.get(split, ()) if Path(name).suffix.lower() in READERS]
    if not files:
        raise ValueError(f"the folder has no files of {[*READERS]} for {split}, such as {split}.csv")
    return files


def _from_hub(name: str, split: str) -> datasets.Dataset:
    if not datasets.config.HF_HUB_OFFLINE and not hub_answers(name, repo_type="dataset"):
        raise ConnectionError(
            f"{constants.ENDPOINT} cannot be reached; connect, or with HF_HUB_OFFLINE=1 the cache of datasets is read"
        )
    with quiet():
        return datasets.load_dataset(name, split=split)
