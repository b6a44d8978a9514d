"""The kinds of files that hold rows, and the heading of a table; without ``datasets``, which loads slowly."""

import csv
from pathlib import Path

# The ends of the names of files that hold rows.
KINDS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".txt")
TABLES = (".csv", ".tsv")
_DELIMITERS = ",;\t"


def heading_of(path: Path) -> tuple[str, str, list[str]]:
    """(the first line of a table that is not empty, the delimiter that gives it most cells, these cells)."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        line = next(filter(str.strip, file), "")
    cells = {sign: next(csv.reader([line], delimiter=sign), []) for sign in _DELIMITERS}
    delimiter = max(cells, key=lambda sign: len(cells[sign]))
    return line, delimiter, cells[delimiter]
