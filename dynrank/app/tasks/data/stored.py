"""Checked rows in the disk cache of ``datasets``, from which they are memory-mapped; all faults are listed at once."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from dynrank.app.tasks.data.columns import Columns
from dynrank.app.tasks.data.rows import Numbered, checked_rows, features_of
from dynrank.errors import ConfigurationError
from dynrank.output.whole_file import DISK_FULL

# Increase this number when rows are read differently, so that old rows in a cache are not used.
READ = 9
# The fewest rows for which one more process is worth its start.
_ENOUGH = 20_000
# The most faults that one message lists, and the most rows of one fault.
SHOWN = 20


class RawRows(NamedTuple):
    """Rows before they are checked.

    Attributes:
        where: their name in errors.
        key: a text that changes with the rows.
        read: function that reads them.
        types: the types of the columns, if known.
    """

    where: str
    key: str
    read: Callable[[], Iterator[Numbered]]
    types: Mapping[str, Any] = {}


def of_dataset(rows: datasets.Dataset, where: str) -> RawRows:
    """The rows of a data set; pictures and sounds in them are not decoded."""

    def read() -> Iterator[Numbered]:
        batches = rows.with_format("arrow").iter(1000)
        return enumerate((row for batch in batches for row in batch.to_pylist()), start=1)

    return RawRows(where, rows._fingerprint, read, rows.features)


def usable_rows(rows: RawRows, columns: Columns, *, skip: bool = False) -> tuple[datasets.Dataset, int]:
    """The rows, as :func:`dynrank.app.tasks.data.rows.checked_rows` makes them, and the number of those left out.

    Rows with a fault are left out with ``skip``; otherwise one error lists them.
    """
    key = Hasher.hash(str((READ, rows.key, columns)))
    features = features_of(columns)
    with reading(rows.where), quiet():
        made = datasets.Dataset.from_generator(
            lambda: checked_rows(rows.read(), columns), features=features, fingerprint=key
        )
    faults = column_of(made, "fault")
    wrong = np.flatnonzero(pc.is_valid(faults))
    if len(wrong) and not (skip and len(wrong) < len(made)):
        places = column_of(made, "place").take(wrong).to_pylist()
        refuse(rows.where, zip(places, faults.take(wrong).to_pylist(), strict=True))
    kept = made.select(np.flatnonzero(pc.is_null(faults))) if len(wrong) else made
    return kept.remove_columns("fault"), len(wrong)


def refuse(where: str, faults: Iterable[tuple[int, str]]) -> None:
    """Raise one error that lists all faults, each with the numbers of its rows."""
    places: dict[str, list[int]] = {}
    for place, fault in sorted(faults):
        places.setdefault(fault, []).append(place)
    said = [_said(fault, rows) for fault, rows in islice(places.items(), SHOWN)]
    said += [f"and {len(places) - SHOWN:,} other faults"] if len(places) > SHOWN else []
    count = sum(map(len, places.values()))
    advice = f"correct {'it' if count == 1 else f'these {count:,}'}"
    # Only these keys have the other.
    advice += ", or set data.skip_unusable=true" if where.startswith("data.") else ""
    advice += ", or give --skip-unusable" if where.startswith(("FILE", "TEXT")) else ""
    if len(said) == 1:
        raise ConfigurationError(f"{where}: {said[0]}; {advice}")
    raise ConfigurationError("\n  ".join([f"{where}:", *said]) + f"\n{advice}")


def _said(fault: str, rows: Sequence[int]) -> str:
    if len(rows) == 1:
        return f"row {rows[0]} {fault}"
    more = f" and {len(rows) - SHOWN:,} more" if len(rows) > SHOWN else ""
    return f"rows {', '.join(map(str, rows[:SHOWN]))}{more}: each {fault}"


def column_of(rows: datasets.Dataset, name: str) -> pa.ChunkedArray:
    """A column of the rows as an Arrow array."""
    found: pa.ChunkedArray = rows.select_columns(name).with_format("arrow")[:][name]
    return found


def counted(rows: datasets.Dataset) -> dict[str, int]:
    """{label: number of its rows}, the most frequent first."""
    labels = column_of(rows, "label")
    if pa.types.is_list(labels.type):
        labels = pc.list_flatten(labels)
    counts = {pair["values"]: pair["counts"] for pair in pc.value_counts(labels).to_pylist()}
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def class_of_rows(rows: datasets.Dataset) -> pa.DictionaryArray:
    """The label of each row; of several labels, the rarest."""
    labels = column_of(rows, "label").combine_chunks()
    if pa.types.is_list(labels.type):
        counts = counted(rows)
        rarest = (min(each, key=lambda label: (counts[label], label), default="") for each in rows["label"])
        labels = pa.array(rarest, pa.string())
    return labels.dictionary_encode()


class Pairs(NamedTuple):
    """Each pair of a row and one of its labels.

    Attributes:
        rows: (pairs,) the index of the row.
        labels: (pairs,) the index of the label in ``names``.
        names: the labels.
    """

    rows: Any
    labels: Any
    names: list[str]


def pairs_of(rows: datasets.Dataset) -> Pairs:
    """Each pair of a row and one of its labels, in the order of the rows."""
    labels = column_of(rows, "label").combine_chunks()
    owners = np.arange(len(labels))
    if pa.types.is_list(labels.type):
        owners = pc.list_parent_indices(labels).to_numpy()
        labels = pc.list_flatten(labels)
    coded = labels.dictionary_encode()
    return Pairs(owners, coded.indices.to_numpy(), coded.dictionary.to_pylist())


def ambiguous_texts(rows: datasets.Dataset) -> dict[str, int]:
    """{label: number of the texts that have it in some of their rows, and not in others}; 0 is left out.

    The rows have the digests of their texts.
    """
    _, texts, sizes = np.unique(column_of(rows, "digest").to_numpy(), return_inverse=True, return_counts=True)
    pairs = pairs_of(rows)
    triples = np.stack([texts[pairs.rows], pairs.labels, pairs.rows])
    # A list may have a label twice; most texts have one row.
    once = np.unique(triples[:, sizes[triples[0]] > 1], axis=1)
    (of_text, label), counts = np.unique(once[:2], axis=1, return_counts=True)
    numbers = np.bincount(label[counts < sizes[of_text]], minlength=len(pairs.names))
    return {name: count for name, count in sorted(zip(pairs.names, numbers.tolist(), strict=True)) if count}


def system_prompt(rows: datasets.Dataset) -> str | None:
    """The system prompt with which every chat begins; None if chats begin in different ways."""
    found: set[tuple[str, str]] = set()
    for batch in rows.select_columns("messages").with_format("arrow").iter(1000):
        first = pc.list_element(batch["messages"], 0)
        found |= {(turn["role"], turn["content"]) for turn in first.to_pylist()}
        if len(found) > 1:
            return None
    ((role, content),) = found
    return content if role == "system" else None


def processes(rows: int) -> int | None:
    """The number of processes in which ``datasets`` handles this many rows; None: this process does it alone."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(cores, rows // _ENOUGH)
    return count if count > 1 else None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence ``datasets`` within the block; on a terminal it shows progress bars."""
    (datasets.enable_progress_bars if sys.stderr.isatty() else datasets.disable_progress_bars)()
    verbosity = datasets.logging.get_verbosity()
    # datasets would log each error that it raises.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn errors of reading within the block into a ConfigurationError that names the data as ``where``."""
    try:
        yield
    except ConfigurationError:
        raise
    except (OSError, ValueError, RecursionError, datasets.exceptions.DatasetsError) as error:
        cause: Any = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        if getattr(cause, "errno", None) in DISK_FULL:
            raise ConfigurationError(
                f"{where} cannot be stored in the cache of datasets, {str(datasets.config.HF_DATASETS_CACHE)!r}: "
                f"{os.strerror(cause.errno)}; free space, or set HF_HOME to a folder on another disk"
            ) from cause
        said = " ".join(str(cause).split())
        advice = "save it as UTF-8" if "utf" in said.lower() else "correct it, or name another"
        # So says pyarrow of a row of csv that is longer than a block.
        advice = "write texts of megabytes as jsonl" if "straddling" in said else advice
        raise ConfigurationError(f"{where} cannot be read: {said}; {advice}") from error
