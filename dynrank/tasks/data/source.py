"""Reading the rows of a source that a user names: a file, a folder, or a data set on the hub."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets.builder import Key
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.fingerprint import Hasher
from datasets.packaged_modules.cache.cache import Cache
from lightning.pytorch.utilities import rank_zero_only
from pyarrow.csv import ConvertOptions, InvalidRow, ParseOptions, ReadOptions, open_csv

from dynrank.errors import ConfigurationError
from dynrank.models.names import hub_is_known
from dynrank.output.console import print_facts
from dynrank.tasks.data.cache import READ, filling, quiet
from dynrank.tasks.data.columns import Columns
from dynrank.tasks.data.rows import FAULT, LINE, PARAGRAPH, ROW, refuse, usable_rows
from dynrank.tasks.data.splits import first_rows, read_dataset

# Only process 0 prints.
say = rank_zero_only(print_facts)
# The names of splits in folders and on the hub.
_THEIR_SPLITS = {"train": "train", "val": "validation", "test": "test"}
# What datasets says of them.
_NO_ROWS = 'Instruction "train" corresponds to no data!'
# Bytes of a csv file that are parsed at once; a row must fit.
_BLOCK = 2**24


class Source:
    """The rows that a name stands for, as ``datasets`` stores them, before :meth:`read` checks them.

    Args:
        name: name of a file, a folder or a data set on the hub.
        key: the key or option that holds the name, for errors.
        split: train, val or test, if the folder or the data set has splits.

    Attributes:
        where: the name of the source in errors.
        rows: {name in errors: rows} of each file.
        sample: the first rows.
        types: the types of the columns.
    """

    def __init__(self, name: str | None, key: str, split: str) -> None:
        kinds = f"a file ({', '.join(READERS)}), a folder, or ORG/NAME on the hub"
        if not name:
            raise ConfigurationError(f"{key} is not set; set {key} to your rows: {kinds}")
        self.where = f"{key}={name}"
        path = Path(name).expanduser()
        on_hub = name.count("/") == 1 and not path.exists() and not path.suffix
        if not on_hub and not path.exists():
            raise ConfigurationError(f"{self.where} does not exist; set {key} to {kinds}")
        if path.is_file() and path.suffix.lower() not in READERS:
            raise ConfigurationError(f"{key} must be {kinds}, got {name!r}; set {key}")
        try:
            if on_hub:
                self.rows = {self.where: _from_hub(name, _THEIR_SPLITS[split])}
            elif path.is_file():
                self.rows = {self.where: _from_file(path)}
            elif any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
                self.rows = {self.where: _from_disk(path, _THEIR_SPLITS[split])}
            else:
                files = _files_in(path, _THEIR_SPLITS[split])
                self.rows = {f"{self.where}, {file}": _from_file(file) for file in files}
        except ConfigurationError:
            raise
        except (OSError, ValueError, RecursionError, datasets.exceptions.DatasetsError) as error:
            cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
            said = " ".join(str(cause).split()).replace(_NO_ROWS, "it has 0 rows")
            advice = "save it as UTF-8" if "utf" in said.lower() else f"correct it, or set {key}"
            raise ConfigurationError(f"{self.where} cannot be read: {said}; {advice}") from error
        where, rows = next(iter(self.rows.items()))
        first = first_rows(rows)
        if not first:
            raise ConfigurationError(f"{where} has 0 rows; correct it")
        self.sample = [row for _, row in first if not isinstance(row, str)]
        self.types = rows.features
        if not self.sample:
            # Without a row, no column is known.
            refuse(where, [(place, row) for place, row in first if isinstance(row, str)], "correct")

    def read(self, columns: Columns, *, skip: bool = False) -> tuple[datasets.Dataset, int]:
        """All usable rows, as :func:`dynrank.tasks.data.rows.read_rows` makes them, and the number of others.

        If there are others, they are an error; with ``skip`` they are left out.
        """
        made = {where: read_dataset(rows, columns) for where, rows in self.rows.items()}
        usable = [usable_rows(rows, where, skip=skip) for where, rows in made.items()]
        unusable = sum(map(len, made.values())) - sum(map(len, usable))
        if len(usable) == 1:
            return usable[0], unusable
        together = datasets.concatenate_datasets(usable)
        # Without this line, datasets would draw a random fingerprint each time.
        together._fingerprint = Hasher.hash(str([part._fingerprint for part in usable]))
        return together, unusable


def _from_file(path: Path) -> datasets.Dataset:
    say({"reading": f"{path}, {path.stat().st_size / 1e6:,.1f} MB"})
    # A file that cannot be opened is named here; later errors of the system are about the cache.
    path.open("rb").close()
    with filling():
        return READERS[path.suffix.lower()](path)


def _lines(path: Path) -> datasets.Dataset:
    """Each line is a row of JSON; it stays a text until the rows are checked, so that each line has its own fault."""
    return _texts(path, LINE, "line")


def _paragraphs(path: Path) -> datasets.Dataset:
    return _texts(path, PARAGRAPH, "paragraph")


def _texts(path: Path, column: str, sample_by: str) -> datasets.Dataset:
    features = datasets.Features({column: datasets.Value("string")})
    return datasets.Dataset.from_text(str(path), features=features, sample_by=sample_by, encoding="utf-8-sig")


def _tables(path: Path, read: Callable[[Path], Iterator[pa.Table]]) -> datasets.Dataset:
    state = path.stat()
    key = Hasher.hash(str((READ, path.resolve(), state.st_mtime_ns, state.st_size)))
    builder = _Tables(hash=key, dataset_name="rows")
    builder.source = {"path": path, "read": read}
    builder.download_and_prepare()
    return builder.as_dataset(split="train")


class _Tables(datasets.ArrowBasedBuilder):  # type: ignore[misc]
    """Stores the tables that a function reads from a file in the cache of ``datasets``."""

    source: dict[str, Any]

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo()

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name="train", gen_kwargs=self.source)]

    def _generate_tables(
        self, path: Path, read: Callable[[Path], Iterator[pa.Table]]
    ) -> Iterator[tuple[Key, pa.Table]]:
        for number, table in enumerate(read(path)):
            yield Key(0, number), table


def _csv(path: Path) -> Iterator[pa.Table]:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        heading = next(filter(str.strip, file), "")
    delimiter = max(",;\t|", key=heading.count)
    advice = f"a text that holds {delimiter!r} belongs in quotes"
    return _cells(path, advice, delimiter=delimiter, newlines_in_values=True)


def _tsv(path: Path) -> Iterator[pa.Table]:
    """Each line is a row, whatever quotes are in it; a cell that is quoted as a whole loses its quotes."""
    advice = "in a tsv file each line is a row: write others as csv or jsonl"
    for table in _cells(path, advice, delimiter="\t", quote_char=False):
        cells = [_unquoted(cells) if pa.types.is_string(cells.type) else cells for cells in table.columns]
        yield pa.table(cells, schema=table.schema)


def _unquoted(cells: pa.ChunkedArray) -> pa.ChunkedArray:
    inner = pc.replace_substring(pc.utf8_slice_codeunits(cells, 1, -1), '""', '"')
    return pc.if_else(pc.match_substring_regex(cells, r'^"([^"]|"")*"$'), inner, cells)


def _cells(path: Path, advice: str, **options: Any) -> Iterator[pa.Table]:
    """Tables of the cells, which are all texts, with the columns ``ROW`` and ``FAULT``; the heading is row 1."""
    faults: dict[int, str] = {}

    def leave_out(row: InvalidRow) -> str:
        faults[row.number] = f"has {row.actual_columns} cells, and the heading {row.expected_columns}: {advice}"
        return "skip"

    # Only one thread counts the rows.
    reading = ReadOptions(use_threads=False, block_size=_BLOCK)
    parsing = ParseOptions(invalid_row_handler=leave_out, **options)
    names = open_csv(path, reading, parsing).schema.names
    ours = [name.strip() for name in names]
    if twice := next((name for name in ours if name and ours.count(name) > 1), None):
        raise ValueError(f"it has two columns {twice!r}")
    texts = ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
    schema = pa.schema([*((name, pa.string()) for name in ours), (ROW, pa.int64()), (FAULT, pa.string())])
    last = 1
    for batch in open_csv(path, reading, parsing, texts):
        rows = [*islice((row for row in count(last + 1) if row not in faults), len(batch))]
        last = max(rows, default=last)
        yield pa.table([*batch.columns, pa.array(rows, pa.int64()), pa.nulls(len(batch), pa.string())], schema=schema)
    yield pa.table(
        {**dict.fromkeys(ours, pa.nulls(len(faults), pa.string())), ROW: [*faults], FAULT: [*faults.values()]}, schema
    )


def _json(path: Path) -> Iterator[pa.Table]:
    """Lines of JSON from a document, which is a list of rows or an object with one, or has a row in each line."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        # What follows a first document is another: each line is a row.
        if error.msg != "Extra data":
            raise
        yield pa.table({LINE: text.split("\n")})
        return
    lists = [value for value in found.values() if isinstance(value, list)] if isinstance(found, dict) else [found]
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise ValueError("it has no list of rows, or several: write [{...}, {...}], or each row in a line of its own")
    yield pa.table({LINE: [*map(json.dumps, lists[0])]})


# Rows of JSON stay texts until they are checked, so that each has its own fault, and values of all types.
READERS: dict[str, Callable[[Path], datasets.Dataset]] = {
    ".csv": partial(_tables, read=_csv),
    ".tsv": partial(_tables, read=_tsv),
    ".json": partial(_tables, read=_json),
    **dict.fromkeys((".jsonl", ".ndjson"), partial(_texts, column=LINE, sample_by="line")),
    ".parquet": lambda path: datasets.Dataset.from_parquet(str(path)),
    ".txt": partial(_texts, column=PARAGRAPH, sample_by="paragraph"),
}


def _files_in(folder: Path, split: str) -> list[Path]:
    """The files of a split in a folder, by the rules of ``datasets``."""
    base = str(folder.resolve())
    found = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
    files = [Path(name) for name in found.get(split, ()) if Path(name).suffix.lower() in READERS]
    if not files:
        raise ValueError(f"the folder has no files of {[*READERS]} for {split}, such as {split}.csv")
    return files


def _from_hub(name: str, split: str) -> datasets.Dataset:
    with quiet():
        if hub_is_known():
            return datasets.load_dataset(name, split=split)
        kept = Cache(repo_id=name, dataset_name=name.split("/")[-1], version="auto", hash="auto")
        kept.download_and_prepare()
        return kept.as_dataset(split=split)


def _from_disk(folder: Path, split: str) -> datasets.Dataset:
    """The rows that ``save_to_disk`` wrote; the split, if there are several."""
    found = datasets.load_from_disk(folder)
    if isinstance(found, datasets.DatasetDict) and split not in found:
        raise ValueError(f"it has the splits {[*found]}, not {split}")
    return found[split] if isinstance(found, datasets.DatasetDict) else found
