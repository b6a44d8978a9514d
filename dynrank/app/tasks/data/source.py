"""Reading the rows of a source that a user names, by ``datasets``: a file, or a data set on the hub."""

import csv
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pandas
import pyarrow as pa
from datasets.exceptions import DatasetGenerationError

from dynrank.errors import ConfigurationError

# The ends of the names of files that hold rows.
KINDS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".txt")
_TEXT = datasets.Value("string")


class RawRows(NamedTuple):
    """Rows before they are checked.

    Attributes:
        where: their name in errors.
        rows: the rows.
        first: the number of the first one, which is 2 after a heading.
    """

    where: str
    rows: datasets.Dataset
    first: int = 1


def read_source(name: str | None, key: str, split: str) -> RawRows:
    """The rows that a name stands for, before they are checked.

    Args:
        name: name of a file, or of a data set on the hub.
        key: the key or option that holds the name, for errors.
        split: train, val or test, for a data set on the hub.
    """
    kinds = f"a file ({', '.join(KINDS)}){', or ORG/NAME on the hub' if key.startswith('data.') else ''}"
    where = f"{key}={name}"
    path = Path(name or "").expanduser()
    with reading(where):
        # A version is no suffix: teknium/OpenHermes-2.5.
        if name and name.count("/") == 1 and not path.exists() and not path.suffix[1:2].isalpha():
            return RawRows(where, datasets.load_dataset(name, split="validation" if split == "val" else split))
        if not path.exists():
            raise ConfigurationError(f"{where} does not exist; set {key} to {kinds}")
        if not path.is_file() or path.suffix.lower() not in KINDS:
            raise ConfigurationError(f"{key} must be {kinds}, got {name!r}; set {key}")
        return _from_file(path, where)


def _from_file(path: Path, where: str) -> RawRows:
    suffix = path.suffix.lower()
    reader = "csv" if suffix in (".csv", ".tsv") else {".parquet": "parquet", ".txt": "text"}.get(suffix, "json")
    options = {"text": {"sample_by": "paragraph", "encoding": "utf-8-sig"}}.get(reader, {})
    if reader == "csv":
        options = _cells(path)
    rows = datasets.load_dataset(reader, data_files=[escape(str(path.resolve()))], split="train", **options)
    # The heading of a table is its first row.
    return RawRows(where, rows, first=2 if reader == "csv" else 1)


def _cells(path: Path) -> dict[str, Any]:
    """How pandas reads a table: cells are texts as they stand there."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        line = next(filter(str.strip, file), "")
    headings = {sign: next(csv.reader([line], delimiter=sign), []) for sign in ",;\t"}
    delimiter, names = max(headings.items(), key=lambda pair: len(pair[1]))
    how: dict[str, Any] = {"sep": delimiter, "keep_default_na": False, "encoding": "utf-8-sig"}
    first = pandas.read_csv(path, nrows=1, dtype=str, **how)
    # pandas gives the second of two such columns another name.
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise ValueError(f"it has two columns {twice[0]!r}")
    # Then pandas would take the first cells for names of rows.
    if not isinstance(first.index, pandas.RangeIndex):
        raise ValueError(f"row 2 has more cells than the heading: a text that holds {delimiter!r} belongs in quotes")
    return {**how, "features": datasets.Features(dict.fromkeys(first.columns, _TEXT))}


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn errors of reading within the block into a ConfigurationError that names the data as ``where``.

    From here on ``datasets`` is silent; on a terminal it shows progress bars.
    """
    (datasets.enable_progress_bars if sys.stderr.isatty() else datasets.disable_progress_bars)()
    # It would log each error that it raises.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    except ConfigurationError:
        raise
    except (OSError, ValueError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        cause: Any = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        said = " ".join(str(cause).split())
        advice = "save it as UTF-8" if "utf" in said.lower() else "correct it, or name another"
        raise ConfigurationError(f"{where} cannot be read: {said}; {advice}") from cause
