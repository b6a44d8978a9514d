"""Reading metrics.csv of a run."""

from __future__ import annotations

import csv
from pathlib import Path

from dynrank.errors import ConfigurationError

__all__ = ["Series", "read_metrics"]

Series = tuple[list[int], list[float]]
"""Optimizer steps, and the value of a metric at each of them."""


def read_metrics(file: Path) -> dict[str, Series]:
    """{metric: its steps and values} of a run's metrics.csv; metrics without any value are left out.

    Raises:
        ConfigurationError: if the file cannot be read, or a cell is no number; it names the line.
    """
    metrics: dict[str, Series] = {}
    try:
        with file.open(newline="", encoding="utf-8") as opened:
            rows = csv.DictReader(opened)
            for row in rows:
                step = int(row.pop("step"))
                for name, number in [(name, float(cell)) for name, cell in row.items() if cell]:
                    steps, values = metrics.setdefault(name, ([], []))
                    steps.append(step)
                    values.append(number)
    except OSError as error:
        raise ConfigurationError(f"cannot read {str(file)!r}: {error.strerror or error}") from None
    except (KeyError, TypeError, ValueError):
        raise ConfigurationError(f"{str(file)!r} must hold numbers, line {rows.line_num} does not") from None
    return metrics
