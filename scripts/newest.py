"""Adds a row to results/newest.csv: the versions with which scripts/test --newest, which runs this, has just passed.

scripts/release shows the last row. tests/test_versions.py compares the upper bounds of pyproject.toml with the highest
versions of the file.
"""

import csv
import datetime
import platform
from importlib.metadata import version
from pathlib import Path

import torch

row = {
    "date": datetime.date.today().isoformat(),
    "python": platform.python_version(),
    "torch": torch.__version__,
    **{name: version(name) for name in ("lightning", "transformers", "peft")},
}
table = Path(__file__).parent / "results" / "newest.csv"
with table.open("a", newline="", encoding="utf-8") as file:
    csv.writer(file, lineterminator="\n").writerow(row.values())
print(f"noted in {table}: {', '.join(f'{name} {value}' for name, value in row.items())}")
