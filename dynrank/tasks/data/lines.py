"""Reading the rows of a file, each with its line: csv, tsv, json, jsonl, parquet and txt."""

import codecs
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

# (a place in the file, from 1 on; the row there, or a text that says what is wrong).
Rows = Iterator[tuple[int, Mapping[str, Any] | str]]

# Bytes that are read at once, and the fewest for one process.
_BLOCK = 2**24
_BLANKS = re.compile(r"\s*")
_QUOTED = re.compile(r'"((?:[^"]|"")*)"')
# The start of an array, or of an object in which an array of objects follows simple values.
_LIST = re.compile(r"\s*(?:\[|(?P<within>\{)[^\[{]*\[(?=\s*\{))")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Part:
    """A part of a file that one process can read.

    Attributes:
        path: path of the file.
        start: start of the part, in bytes; of a parquet file, in groups of rows.
        end: end of the part, in the same unit.
        place: number of the first line; of a parquet file, of the first row.
    """

    path: str
    start: int
    end: int
    place: int

    def rows(self) -> Rows:
        """The rows of the part with their places."""
        yield from READERS[kind_of(Path(self.path))](self)


def kind_of(path: Path) -> str:
    """The suffix of a file's name in lower case; a key of :data:`READERS` if the file can be read."""
    return path.suffix.lower()


def survey(path: Path) -> tuple[str, list[Part]]:
    """(hash of the content of a file, parts that several processes can read)."""
    running, starts, size, line = sha256(), [(0, 1)], 0, 1
    with path.open("rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ValueError("it is UTF-16; save it as UTF-8")
        file.seek(0)
        while block := file.read(_BLOCK):
            running.update(block)
            size, line = size + len(block), line + block.count(b"\n")
            starts.append((size - len(block) + block.rfind(b"\n") + 1, line))
    if kind_of(path) == ".parquet":
        groups = pq.ParquetFile(path).metadata
        starts = [(0, 1)]
        for group in range(groups.num_row_groups):
            starts.append((group + 1, starts[-1][1] + groups.row_group(group).num_rows))
        size = groups.num_row_groups
    elif kind_of(path) not in _JSON or not _has_lines(path):
        starts = starts[:1]
    ends = [*(start for start, _ in starts[1:]), size]
    pairs = zip(starts, ends, strict=True)
    return running.hexdigest(), [Part(str(path), start, end, place) for (start, place), end in pairs if start < end]


def types_in(path: Path) -> Mapping[str, Any]:
    """The types of a parquet file's columns; other files have no types."""
    return datasets.Features.from_arrow_schema(pq.read_schema(path)) if kind_of(path) == ".parquet" else {}


def _csv(part: Part) -> Rows:
    csv.field_size_limit(sys.maxsize)
    # A byte that is not UTF-8 becomes a lone surrogate, which the check of texts refuses.
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
            yield line, f"is not CSV{until}: {error}; a quote within quotes is written twice"


def _tsv(part: Part) -> Rows:
    """Each line is a row, whatever quotes are in it; a cell that is quoted as a whole loses its quotes."""
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
            if twice := next((name for name in names if name and names.count(name) > 1), None):
                yield line, f"has two columns {twice!r}"
                return
        elif cells and len(cells) == len(names):
            yield line, dict(zip(names, cells, strict=True))
        elif cells:
            yield line, f"has {len(cells)} cells, and the heading {len(names)}: {advice}"


def _json(part: Part) -> Rows:
    """A row in each line, or one array of rows."""
    if not _has_lines(Path(part.path)):
        yield from _json_array(part)
        return
    with open(part.path, "rb") as file:
        file.seek(part.start)
        place = part.start
        for number, line in enumerate(file, start=part.place):
            if place >= part.end:
                return
            place += len(line)
            if row := line.removeprefix(codecs.BOM_UTF8).strip():
                yield number, _row_in(row)


def _row_in(line: bytes) -> dict[str, Any] | str:
    try:
        return _object(json.loads(line.decode()))
    except (ValueError, RecursionError) as error:
        return _not_json(error)


def _json_array(part: Part) -> Rows:
    content = Path(part.path).read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield content.count(b"\n", 0, error.start) + 1, _not_json(error)
        return
    start = _LIST.match(text)
    if not start:
        yield 1, "begins no list of rows: write [{...}, {...}], or each row in a line of its own"
        return
    place, line, counted = _after_blanks(text, start.end()), 1, 0
    while not text.startswith("]", place):
        line, counted = line + text.count("\n", counted, place), place
        try:
            found, place = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            yield line, _not_json(error)
            return
        yield line, _object(found)
        place = _after_blanks(text, place)
        if text.startswith(",", place):
            place = _after_blanks(text, place + 1)
        elif not text.startswith("]", place):
            yield line + text.count("\n", counted, place), "is not JSON: ',' or ']' must follow a row"
            return
    rest = text[place + 1 :].strip()
    if rest != ("}" if start["within"] else ""):
        yield line, f"ends the list, and more follows: {shown(rest)}; a file must hold one list of rows"


def _after_blanks(text: str, place: int) -> int:
    match = _BLANKS.match(text, place)
    return match.end() if match else place


def _not_json(error: Exception) -> str:
    return f"is {'not UTF-8' if isinstance(error, UnicodeDecodeError) else 'not JSON'}: {error}"


def _object(found: Any) -> dict[str, Any] | str:
    return found if isinstance(found, dict) else f"must be a row {{column: value}}, got {shown(found)}"


def _has_lines(path: Path) -> bool:
    """Whether each row is a line; a .json file may also be one document, which then holds an array of rows."""
    with path.open("rb") as file:
        lines = filter(None, (line.removeprefix(codecs.BOM_UTF8).strip() for line in file))
        first, second = next(lines, b""), next(lines, b"")
    in_lines = kind_of(path) != ".json" or (first.endswith(b"}") and second.startswith(b"{"))
    return in_lines and not first.startswith(b"[")


def _txt(part: Part) -> Rows:
    """Each paragraph, the lines between blank lines, is a text."""
    with open(part.path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for blank, group in groupby(enumerate(file, start=1), key=lambda numbered: not numbered[1].strip()):
            if not blank:
                lines = [*group]
                yield lines[0][0], {"text": "".join(line for _, line in lines).rstrip("\n")}


def _parquet(part: Part) -> Rows:
    batches = pq.ParquetFile(part.path).iter_batches(1000, row_groups=[*range(part.start, part.end)])
    yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=part.place)


_JSON = (".json", ".jsonl", ".ndjson")
READERS: dict[str, Callable[[Part], Rows]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    **dict.fromkeys(_JSON, _json),
    ".parquet": _parquet,
    ".txt": _txt,
}
