"""The table metrics.csv of a run that is resumed in its folder: Lightning's logger would begin it again."""

import csv
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger

from dynrank.app.runs.folder import METRICS
from dynrank.output.whole_file import whole_file


def go_on(folder: Path, step: int, logger: CSVLogger) -> None:
    """Remove the rows of ``step`` and later, and let the ``logger`` of the resumed run add its rows to the others."""
    file = folder / METRICS
    if not file.exists():
        return
    with file.open(newline="", encoding="utf-8") as opened:
        reader = csv.DictReader(opened)
        # A row that was cut short by a kill may have no step.
        rows = [row for row in reader if (row.get("step") or "").isdigit() and int(row["step"]) < step]
        names = list(reader.fieldnames or ["step"])
    with whole_file(file) as part:
        with part.open("w", newline="", encoding="utf-8") as opened:
            writer = csv.DictWriter(opened, names, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        # Lightning deletes the file here; the part then replaces it.
        logger.experiment.metrics_keys = names


def drop_repeated_rows(folder: Path) -> None:
    """Remove the second of equal rows: a resumed run repeats the validation after its checkpoint.

    After the last step of an epoch the repeated one has the number of the next epoch.
    """
    with (folder / METRICS).open(newline="", encoding="utf-8") as opened:
        reader = csv.DictReader(opened)
        first: dict[tuple[str, ...], dict[str, str]] = {}
        for row in reader:
            first.setdefault(tuple(value for name, value in row.items() if name != "epoch"), row)
    with whole_file(folder / METRICS) as part, part.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, reader.fieldnames or ["step"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(first.values())
