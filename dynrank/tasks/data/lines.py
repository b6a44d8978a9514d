"""The rows of a file as they stand there, each with its line: csv, tsv, json, jsonl, parquet and txt."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq

from dynrank.errors import shown

# A place in the file, from 1 on, and a row there or what is wrong with it.
Rows = Iterator[tuple[int, Mapping[str, Any] | str]]

# Bytes that are read at a time, and the fewest that a process is given.
_BLOCK = 2**24
_BLANKS = re.compile(r"\s*")
_QUOTED = re.compile(r'"((?:[^"]|"")*)"')
_BOM = b"\xef\xbb\xbf"
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Part:
    """A part of a file that can be read by itself.

    Attributes:
        path: of the file.
        start: where it begins, in bytes or, of parquet, in groups of rows.
        end: where it ends.
        place: the line, or the number of the row, that it begins with.
    """

    path: str
    start: int
    end: int
    place: int

    def rows(self) -> Rows:
        """The rows of the part."""
        yield from READERS[Path(self.path).suffix](self)


def survey(path: Path) -> tuple[str, list[Part]]:
    """(a hash of all that is in a file, the parts that processes can share out)."""
    running, starts, size, line = sha256(), [(0, 1)], 0, 1
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            running.update(block)
            size, line = size + len(block), line + block.count(b"\n")
            starts.append((size - len(block) + block.rfind(b"\n") + 1, line))
    if path.suffix == ".parquet":
        groups = pq.ParquetFile(path).metadata
        starts = [(0, 1)]
        for group in range(groups.num_row_groups):
            starts.append((group + 1, starts[-1][1] + groups.row_group(group).num_rows))
        size = groups.num_row_groups
    elif path.suffix not in _JSON or _is_array(path):
        starts = starts[:1]
    ends = [*(start for start, _ in starts[1:]), size]
    pairs = zip(starts, ends, strict=True)
    return running.hexdigest(), [Part(str(path), start, end, place) for (start, place), end in pairs if start < end]


def types_in(path: Path) -> Mapping[str, Any]:
    """The types of a parquet file's columns; of other files nothing is known."""
    return datasets.Features.from_arrow_schema(pq.read_schema(path)) if path.suffix == ".parquet" else {}


def _csv(part: Part) -> Rows:
    csv.field_size_limit(sys.maxsize)
    # a byte that is no UTF-8 becomes half a character, which no text may hold
    with open(part.path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        header = file.readline()
        file.seek(0)
        delimiter = max(",;\t|", key=header.count)
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        yield from _table(_of_csv(rows), f"a text that holds {delimiter!r} belongs in quotes")


def _of_csv(rows: Any) -> Iterator[tuple[int, list[str] | str]]:
    while True:
        line = rows.line_num + 1
        try:
            yield line, next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            until = "" if rows.line_num == line else f" up to line {rows.line_num}"
            yield line, f"is no CSV{until}: {error}; a quote within quotes is written twice"


def _tsv(part: Part) -> Rows:
    """A line is a row, whatever quotes stand in it; a cell that is quoted as a whole is taken out of its quotes."""
    with open(part.path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        cells = ([_unquoted(cell) for cell in line.rstrip("\r\n").split("\t")] for line in file)
        filled = (row if row != [""] else [] for row in cells)
        yield from _table(enumerate(filled, start=1), "in a tsv file each line is a row: write others as csv or jsonl")


def _unquoted(cell: str) -> str:
    match = _QUOTED.fullmatch(cell)
    return match[1].replace('""', '"') if match else cell


def _table(lines: Iterator[tuple[int, list[str] | str]], advice: str) -> Rows:
    names: list[str] = []
    for line, cells in lines:
        if isinstance(cells, str):
            yield line, cells
        elif cells and not names:
            names = [name.strip() for name in cells]
        elif cells and len(cells) == len(names):
            yield line, dict(zip(names, cells, strict=True))
        elif cells:
            yield line, f"has {len(cells)} cells, and the heading {len(names)}: {advice}"


def _json(part: Part) -> Rows:
    """Rows of a line each, or one array of rows."""
    if _is_array(Path(part.path)):
        yield from _json_array(part)
        return
    with open(part.path, "rb") as file:
        file.seek(part.start)
        place = part.start
        for number, line in enumerate(file, start=part.place):
            if place >= part.end:
                return
            place += len(line)
            if line.strip():
                yield number, _row_in(line)


def _row_in(line: bytes) -> dict[str, Any] | str:
    try:
        return _object(json.loads(line.removeprefix(_BOM).decode()))
    except (ValueError, RecursionError) as error:
        return _not_json(error)


def _json_array(part: Part) -> Rows:
    content = Path(part.path).read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield content.count(b"\n", 0, error.start) + 1, _not_json(error)
        return
    place, line, counted = _behind(text, text.index("[") + 1), 1, 0
    while not text.startswith("]", place):
        line, counted = line + text.count("\n", counted, place), place
        try:
            found, place = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            yield line, _not_json(error)
            return
        yield line, _object(found)
        place = _behind(text, place)
        if text.startswith(",", place):
            place = _behind(text, place + 1)
        elif not text.startswith("]", place):
            yield line + text.count("\n", counted, place), "is no JSON: ',' or ']' must follow a row"
            return


def _behind(text: str, place: int) -> int:
    match = _BLANKS.match(text, place)
    return match.end() if match else place


def _not_json(error: Exception) -> str:
    return f"is {'not UTF-8' if isinstance(error, UnicodeDecodeError) else 'no JSON'}: {error}"


def _object(found: Any) -> dict[str, Any] | str:
    return found if isinstance(found, dict) else f"must be a row {{column: value}}, got {shown(found)}"


def _is_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(_BOM).lstrip().startswith(b"[")


def _txt(part: Part) -> Rows:
    """Paragraphs: what stands between blank lines."""

    def is_blank(numbered: tuple[int, str]) -> bool:
        return not numbered[1].strip()

    with open(part.path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for blank, group in groupby(enumerate(file, start=1), key=is_blank):
            if not blank:
                lines = [*group]
                yield lines[0][0], {"text": "".join(line for _, line in lines).rstrip("\n")}


def _parquet(part: Part) -> Rows:
    groups = range(part.start, part.end)
    place = part.place
    for batch in pq.ParquetFile(part.path).iter_batches(1000, row_groups=[*groups]):
        for row in batch.to_pylist():
            yield place, row
            place += 1


_JSON = (".json", ".jsonl", ".ndjson")
READERS: dict[str, Callable[[Part], Rows]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    **dict.fromkeys(_JSON, _json),
    ".parquet": _parquet,
    ".txt": _txt,
}
