"""Reading metrics.csv of a run."""

from __future__ import annotations

import csv
from pathlib import Path

from dynrank.errors import ConfigurationError

__all__ = ["metric_names", "series"]


def series(metrics_file: Path, name: str) -> tuple[list[int], list[float]]:
    """Optimizer steps and values of a metric in a run's metrics.csv, those steps that have one.

    Raises:
        ConfigurationError: if a row holds something else than numbers there; it names the line.
    """
    steps, values = [], []
    with metrics_file.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        for row in reader:
            if row.get(name):
                try:
                    steps.append(int(row["step"]))
                    values.append(float(row[name]))
                except (KeyError, TypeError, ValueError):
                    raise ConfigurationError(
                        f"{str(metrics_file)!r} must hold numbers as step and {name!r}, line {reader.line_num} does not"
                    ) from None
    return steps, values


def metric_names(metrics_file: Path) -> list[str]:
    """Names of the columns of a run's metrics.csv but for the step, those without a value among them."""
    with metrics_file.open(newline="", encoding="utf-8") as file:
        return [name for name in csv.DictReader(file).fieldnames or () if name != "step"]
