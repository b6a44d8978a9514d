"""Columns of the user's file that come along beside the answers: ``dynrank predict --keep``."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import pyarrow as pa

from dynrank.app.tasks.data.columns import names_in
from dynrank.app.tasks.data.source import Source
from dynrank.errors import ConfigurationError


def kept_columns(keep: Sequence[str], table: Source | None) -> dict[str, str]:
    """{name of a column beside the answers: its name in ``table``} of ``keep``, which has COLUMN or NAME=COLUMN.

    ``table`` is None for texts that are no rows of a table.
    """
    if not keep:
        return {}
    if table is None:
        raise ConfigurationError(f"--keep must go with a file of columns, got --keep {' --keep '.join(keep)}")
    known = names_in(table.sample)
    found = {}
    for text in keep:
        name, _, column = (text, "", text) if text in known else text.rpartition("=")
        if column not in known:
            raise ConfigurationError(f"{table.where} has no column {column!r}; it has {known} (--keep)")
        found[name or column] = column
    return found


def kept_cells(
    table: Source, kept: Mapping[str, str], places: Sequence[int], answers: Sequence[str]
) -> datasets.Dataset:
    """The columns ``kept`` of the rows of ``table`` with the numbers ``places``, which ascend.

    ``answers`` are the names of the other columns in the written file.
    """
    for name in kept:
        if name in answers:
            raise ConfigurationError(
                f"the answers have a column {name!r} of their own; give another name: --keep NAME={kept[name]}"
            )
    wanted = {*places}
    numbered = (row for part in table.parts for row in enumerate(part.rows, start=part.first))
    rows = [row for number, row in numbered if number in wanted]
    found = {}
    for name, column in kept.items():
        try:
            found[name] = _array([row.get(column) for row in rows])
        except (pa.ArrowException, OverflowError) as error:
            raise ConfigurationError(
                f"{table.where} has values of several types in the column {column!r}: {error} (--keep)"
            ) from error
    return datasets.Dataset(pa.table(found))


def as_cells_of_csv(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows with their lists and mappings as JSON, because a cell of csv is a text."""
    table = rows.data.table
    for i, name in enumerate(table.column_names):
        column = table.column(name)
        if pa.types.is_nested(column.type):
            cells = column.to_pylist()
            texts = [None if cell is None else json.dumps(cell, ensure_ascii=False, default=str) for cell in cells]
            table = table.set_column(i, name, pa.array(texts, pa.string()))
    return datasets.Dataset(table)


def _array(cells: list[Any]) -> pa.Array:
    try:
        return pa.array(cells)
    except OverflowError:
        # Hashes as ids have no sign; pyarrow looks only for ints with one.
        return pa.array(cells, pa.uint64())
