"""The tables that runs write."""

import csv


def rows(path, column=None):
    """{heading: cell} of each row of a CSV file, or of those rows that have something in ``column``."""
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if column is None or row[column]]
