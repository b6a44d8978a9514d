"""Reading the rows of a source that a user names: a file, a folder, or a data set on the hub."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from glob import escape
from itertools import count, groupby, islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.fingerprint import Hasher
from huggingface_hub import constants
from lightning.pytorch.utilities import rank_zero_only
from pyarrow.csv import ConvertOptions, InvalidRow, ParseOptions, ReadOptions, open_csv

from dynrank.app.console import print_facts
from dynrank.app.hub import hub_answers
from dynrank.app.tasks.data.columns import SNIFFED, Columns
from dynrank.app.tasks.data.rows import Numbered
from dynrank.app.tasks.data.stored import RawRows, of_dataset, quiet, reading, refuse, usable_rows
from dynrank.errors import ConfigurationError, shown

# Only process 0 prints.
say = rank_zero_only(print_facts)
# The names of splits in folders and on the hub.
_THEIR_SPLITS = {"train": "train", "val": "validation", "test": "test"}
# Bytes of a csv file that are parsed at once; a row must fit.
_BLOCK = 2**22


class Source:
    """The rows that a name stands for; only the first ones are read before :meth:`read`.

    Args:
        name: name of a file, a folder or a data set on the hub.
        key: the key or option that holds the name, for errors.
        split: train, val or test, if the folder or the data set has splits.

    Attributes:
        where: the name of the source in errors.
        parts: the rows of each file.
        sample: the first rows of each file.
        types: the types of the columns, if known.
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
            if path.is_file() and _kind(path) not in READERS:
                raise ConfigurationError(f"{key} must be {kinds}, got {name!r}; set {key}")
            if on_hub:
                self.parts = [of_dataset(_from_hub(name, _THEIR_SPLITS[split]), self.where)]
            elif path.is_file():
                self.parts = [_from_file(path, self.where)]
            else:
                files = _files_in(path, _THEIR_SPLITS[split])
                self.parts = [_from_file(file, f"{self.where}, {file}") for file in files]
        # A later file may have a column that the first one lacks.
        self.sample = [row for part in self.parts for _, row in _first(part) if not isinstance(row, str)]
        self.types = self.parts[0].types
        if not self.sample:
            # Without a row, no column is known.
            refuse(self.parts[0].where, [(number, str(fault)) for number, fault in _first(self.parts[0])])

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


def _first(part: RawRows) -> list[Numbered]:
    """The rows by which columns are found."""
    with reading(part.where):
        found = [*islice(part.read(), SNIFFED)]
    if not found:
        raise ConfigurationError(f"{part.where} has 0 rows; correct it")
    return found


def _kind(path: Path) -> str:
    return path.suffix.lower()


def _from_file(path: Path, where: str) -> RawRows:
    state = path.stat()
    say({"reading": f"{path}, {state.st_size / 1e6:,.1f} MB"})
    schema = pq.read_schema(path) if _kind(path) == ".parquet" else pa.schema([])
    # datasets has stored its types there; it knows none for some columns of other programs.
    known = b"huggingface" in (schema.metadata or {})
    types = datasets.Features.from_arrow_schema(schema) if known else {}
    return RawRows(where, state_of(path), partial(READERS[_kind(path)], path), types)


def state_of(path: Path) -> str:
    """A text that changes with the file, by its place, size and time."""
    state = path.stat()
    return str((path.resolve(), state.st_mtime_ns, state.st_size))


def _csv(path: Path) -> Iterator[Numbered]:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        heading = next(filter(str.strip, file), "")
    delimiter = max(",;\t|", key=re.sub('"[^"]*"', "", heading).count)
    advice = f"a text that holds {delimiter!r} belongs in quotes"
    last: tuple[int, dict[str, str]] | None = None
    end = 0
    for number, row in _table(path, advice, delimiter=delimiter, newlines_in_values=True):
        end = max(end, number)
        if isinstance(row, str):
            yield number, row
            continue
        if last is not None:
            yield last
        last = number, row
    if last is not None:
        number, cells = last
        # To pyarrow the end of the file closes a quoted text, too.
        is_open = number == end and "\n" in next(reversed(cells.values())) and not _ends_with_quote(path)
        yield number, "has a quote that nothing closes, so all that follows is in its text" if is_open else cells


def _ends_with_quote(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _BLOCK))
        return file.read().rstrip().endswith(b'"')


def _tsv(path: Path) -> Iterator[Numbered]:
    """Each line is a row, whatever quotes are in it; a cell that is quoted as a whole loses its quotes."""
    advice = "each line is a row: write others as csv or jsonl"
    for number, row in _table(path, advice, delimiter="\t", quote_char=False):
        yield number, row if isinstance(row, str) else {_unquoted(name): _unquoted(cell) for name, cell in row.items()}


def _unquoted(cell: str) -> str:
    whole = re.fullmatch(r'"((?:[^"]|"")*)"', cell)
    return whole[1].replace('""', '"') if whole else cell


def _table(path: Path, advice: str, **options: Any) -> Iterator[tuple[int, dict[str, str] | str]]:
    """Rows of cells, which are all texts; the heading is row 1."""
    faults: dict[int, str] = {}

    def leave_out(row: InvalidRow) -> str:
        faults[row.number] = f"has {row.actual_columns} cells, and the heading {row.expected_columns}: {advice}"
        return "skip"

    # Only one thread counts the rows.
    blocks = ReadOptions(use_threads=False, block_size=_BLOCK)
    parsing = ParseOptions(invalid_row_handler=leave_out, **options)
    names = open_csv(path, blocks, parsing).schema.names
    ours = [name.strip() for name in names]
    if twice := next((name for name in ours if name and ours.count(name) > 1), None):
        raise ValueError(f"it has two columns {twice!r}")
    texts = ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
    # pyarrow gives rows without their numbers, and has told of all others before them.
    numbers = (number for number in count(2) if number not in faults)
    for batch in open_csv(path, blocks, parsing, texts):
        cells = batch.rename_columns(ours).to_pylist()
        yield from zip(islice(numbers, len(cells)), cells, strict=True)
    yield from faults.items()


def _json(path: Path) -> Iterator[Numbered]:
    """Rows of a document, which is a list or an object with one, or of its lines."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        # What follows a first document is another: each line is a row.
        if error.msg != "Extra data":
            raise
        return _lines(path)
    lists = [value for value in found.values() if isinstance(value, list)] if isinstance(found, dict) else [found]
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise ValueError("it has no list of rows, or several: write [{...}, {...}], or each row in a line of its own")
    return enumerate(map(_row_in, lists[0]), start=1)


def _lines(path: Path) -> Iterator[Numbered]:
    """Each line is a row of JSON, read alone, so that each has its own fault."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield number, _row_in(json.loads(line))
            # The second means that lists are nested too deeply for the parser.
            except (ValueError, RecursionError) as error:
                yield number, f"is not JSON: {error}"


def _row_in(found: Any) -> Mapping[str, Any] | str:
    return found if isinstance(found, dict) else f"must be a row {{column: value}}, got {shown(found)}"


def _paragraphs(path: Path) -> Iterator[Numbered]:
    """Each paragraph, the lines between blank lines, is a text."""
    with path.open(encoding="utf-8-sig") as file:
        groups = groupby(file, key=lambda line: bool(line.strip()))
        texts = ("".join(lines).rstrip("\n") for filled, lines in groups if filled)
        yield from enumerate(({"text": text} for text in texts), start=1)


def _parquet(path: Path) -> Iterator[Numbered]:
    batches = pq.ParquetFile(path).iter_batches(1000)
    return enumerate((row for batch in batches for row in batch.to_pylist()), start=1)


READERS: dict[str, Callable[[Path], Iterator[Numbered]]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    **dict.fromkeys((".jsonl", ".ndjson"), _lines),
    ".json": _json,
    ".parquet": _parquet,
    ".txt": _paragraphs,
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
