"""Reading the rows of a source that a user names: a file, a folder, or a data set on the hub."""

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.builder import Key
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.fingerprint import Hasher
from datasets.packaged_modules.cache.cache import Cache
from lightning.pytorch.utilities import rank_zero_only

from dynrank.errors import ConfigurationError
from dynrank.models.names import hub_is_known
from dynrank.output.console import print_facts
from dynrank.tasks.data.cache import READ, filling, processes, quiet
from dynrank.tasks.data.columns import SNIFFED, Columns, Sample
from dynrank.tasks.data.lines import READERS, Part, kind_of, survey, types_in
from dynrank.tasks.data.rows import SHOWN, check_rows, features_of, read_rows, refuse
from dynrank.tasks.data.splits import read_dataset, sample_of

# Only process 0 prints.
say = rank_zero_only(print_facts)
# The names of splits in folders and on the hub.
_THEIR_SPLITS = {"train": "train", "val": "validation", "test": "test"}
# Rows that are written at once.
_BATCH = 1000
# A rough size of a row in bytes.
_ROW = 200


class Source:
    """The rows that a name stands for; only the first ones are read before :meth:`read`.

    Args:
        name: name of a file, a folder or a data set on the hub.
        key: the key or option that holds the name, for errors.
        split: train, val or test, if the folder or the data set has splits.

    Attributes:
        where: the name of the source in errors.
        sample: the first rows.
        types: the types of the columns, if known.
    """

    def __init__(self, name: str | None, key: str, split: str) -> None:
        if not name:
            kinds = f"a file ({', '.join(READERS)}), a folder, or ORG/NAME on the hub"
            raise ConfigurationError(f"{key} is not set; set {key} to your rows: {kinds}")
        self.where, self.files = f"{key}={name}", dict[Path, tuple[str, list[Part]]]()
        path = Path(name).expanduser()
        try:
            on_hub = name.count("/") == 1 and not path.exists() and not path.suffix
            if on_hub or any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
                self.rows = (_from_hub if on_hub else _from_disk)(name, _THEIR_SPLITS[split])
                self.sample: Sample = sample_of(self.rows)
                self.types = self.rows.features
                return
            paths = _files_in(path, _THEIR_SPLITS[split]) if path.is_dir() else [path]
            if any(kind_of(file) not in READERS or not file.is_file() for file in paths):
                kinds = f"a file of {[*READERS]}, a folder or ORG/NAME on the hub"
                raise ConfigurationError(f"{key} must be {kinds}, got {name!r}; set {key}")
            for file in paths:
                say({"reading": f"{file}, {file.stat().st_size / 1e6:,.1f} MB"})
                self.files[file] = survey(file)
            rows = chain.from_iterable(part.rows() for _, parts in self.files.values() for part in parts)
            first = [*islice(rows, SNIFFED)]
            self.sample = [row for _, row in first if not isinstance(row, str)]
            self.types = types_in(paths[0])
        except ConfigurationError:
            raise
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            said = " ".join(str(error.__cause__ or error).split())
            raise ConfigurationError(f"{self.where} cannot be read: {said}; set {key}") from error
        if not self.sample:
            faults = [f"line {place} {row}" for place, row in first] or ["it has 0 rows"]
            refuse(self.where, faults[:SHOWN], len(faults), "correct")

    def read(self, columns: Columns) -> datasets.Dataset:
        """All rows, as :func:`dynrank.tasks.data.rows.read_rows` makes them, without faults."""
        if not self.files:
            return read_dataset(self.rows, columns, self.where)
        rows = [self._read(file, columns) for file in self.files]
        if len(rows) == 1:
            return rows[0]
        together = datasets.concatenate_datasets(rows)
        # Without this line, datasets would draw a random fingerprint each time.
        together._fingerprint = Hasher.hash(str([part._fingerprint for part in rows]))
        return together

    def _read(self, file: Path, columns: Columns) -> datasets.Dataset:
        content, parts = self.files[file]
        where = self.where if len(self.files) == 1 else f"{self.where}, {file}"
        # This is the hash of a text, because a pickle depends on which equal texts are the same object.
        key = Hasher.hash(str((READ, content, kind_of(file), columns)))
        with filling():
            builder = _Rows(features=features_of(columns), hash=key, dataset_name="rows")
            builder.source = {"parts": parts, "columns": columns}
            builder.download_and_prepare(num_proc=min(len(parts), processes(file.stat().st_size // _ROW) or 1))
            rows = builder.as_dataset(split="train")
        return check_rows(rows, where, "row" if kind_of(file) == ".parquet" else "line")


class _Rows(datasets.ArrowBasedBuilder):  # type: ignore[misc]
    """Reads a file once, and stores its checked rows in the cache under a hash of the file's content."""

    source: dict[str, Any]

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo()

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name="train", gen_kwargs=self.source)]

    def _generate_tables(self, parts: list[Part], columns: Columns) -> Iterator[tuple[Key, pa.Table]]:
        schema = features_of(columns).arrow_schema
        for number, part in enumerate(parts):
            rows, index = part.rows(), 0
            while batch := [*islice(rows, _BATCH)]:
                places, found = zip(*batch, strict=True)
                yield Key(number, index), pa.Table.from_pydict(read_rows(places, found, columns), schema)
                index += 1


def _files_in(folder: Path, split: str) -> list[Path]:
    """The files of a split in a folder, by the rules of ``datasets``."""
    base = str(folder.resolve())
    found = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
    files = [Path(name) for name in found.get(split, ()) if kind_of(Path(name)) in READERS]
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


def _from_disk(folder: str, split: str) -> datasets.Dataset:
    """The rows that ``save_to_disk`` wrote; the split, if there are several."""
    found = datasets.load_from_disk(Path(folder).expanduser())
    if isinstance(found, datasets.DatasetDict) and split not in found:
        raise ValueError(f"it has the splits {[*found]}, not {split}")
    return found[split] if isinstance(found, datasets.DatasetDict) else found
