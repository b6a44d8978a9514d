"""Checked rows in the disk cache of ``datasets``, from which they are memory-mapped; all faults are listed at once."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from dynrank.app.tasks.data.columns import Columns, each
from dynrank.app.tasks.data.rows import checked_rows, features_of
from dynrank.errors import ConfigurationError
from dynrank.output.whole_file import DISK_FULL

# Increase this number when rows are read differently, so that old rows in a cache are not used.
READ = 11
# The most faults that one message lists, and the most rows of one fault.
SHOWN = 20


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


def usable_rows(raw: RawRows, columns: Columns, *, skip: bool = False) -> tuple[datasets.Dataset, int]:
    """The rows, as :func:`dynrank.app.tasks.data.rows.checked_rows` makes them, and the number of those left out.

    Rows with a fault are left out with ``skip``; otherwise one error lists them.
    """
    rows = raw.rows.select_columns([*dict.fromkeys(name for theirs in columns.names.values() for name in each(theirs))])
    label = rows.features.get(columns.names.get("label"))
    quiet()
    with reading(raw.where):
        made = rows.map(
            checked_rows,
            batched=True,
            with_indices=True,
            fn_kwargs={"columns": columns, "first": raw.first, "label": label},
            remove_columns=rows.column_names,
            features=features_of(columns, label),
            new_fingerprint=Hasher.hash(str((READ, raw.rows._fingerprint, columns, raw.first))),
        )
    faults = made["fault"][:]
    wrong = [i for i, fault in enumerate(faults) if fault is not None]
    if wrong and not (skip and len(wrong) < len(made)):
        refuse(raw.where, [(raw.first + i, faults[i]) for i in wrong])
    kept = made.select([i for i, fault in enumerate(faults) if fault is None]) if wrong else made
    return kept.remove_columns("fault"), len(wrong)


def refuse(where: str, faults: Iterable[tuple[int, str]]) -> None:
    """Raise one error that lists all faults, each with the numbers of its rows."""
    places: dict[str, list[int]] = {}
    for place, fault in sorted(faults):
        places.setdefault(fault, []).append(place)
    said = []
    for fault, rows in [*places.items()][:SHOWN]:
        more = f" and {len(rows) - SHOWN:,} more" if len(rows) > SHOWN else ""
        said.append(f"row{'s' * (len(rows) > 1)} {', '.join(map(str, rows[:SHOWN]))}{more}: {fault}")
    said += [f"and {len(places) - SHOWN:,} other faults"] if len(places) > SHOWN else []
    advice = "correct them"
    # The rows of dynrank predict have no such key.
    advice += ", or set data.skip_unusable=true" if where.startswith("data.") else ""
    raise ConfigurationError("\n  ".join([f"{where} has rows that cannot be used; {advice}:", *said]))


def system_prompt(rows: datasets.Dataset) -> str | None:
    """The system prompt with which every chat begins; None if chats begin in different ways."""
    firsts = {(turns[0]["role"], turns[0]["content"]) for turns in rows["messages"]}
    role, content = firsts.pop()
    return content if role == "system" and not firsts else None


def quiet() -> None:
    """Silence ``datasets``; on a terminal it shows progress bars."""
    (datasets.enable_progress_bars if sys.stderr.isatty() else datasets.disable_progress_bars)()
    # It would log each error that it raises.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn errors of reading within the block into a ConfigurationError that names the data as ``where``."""
    try:
        yield
    except ConfigurationError:
        raise
    except (OSError, ValueError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        cause: Any = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        # A full disk under the cache is no fault of the file.
        if getattr(cause, "errno", None) in DISK_FULL:
            raise cause from error
        said = " ".join(str(cause).split())
        advice = "save it as UTF-8" if "utf" in said.lower() else "correct it, or name another"
        raise ConfigurationError(f"{where} cannot be read: {said}; {advice}") from error
