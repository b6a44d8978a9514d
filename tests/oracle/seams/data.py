"""Random tables of users: which rows and classes must a classifier get, and what does predict read?

Each answer is computed anew, by loops over the table.
"""

import contextlib
import csv
import io
import json
import random
import tempfile
from collections import Counter
from pathlib import Path

import datasets

from dynrank.adapters.sidecar_files import Inputs
from dynrank.app.commands.predict import _rows
from dynrank.app.tasks.classification import Classification
from dynrank.app.tasks.data.source import read_source
from dynrank.app.tasks.data.splits import from_files
from dynrank.errors import ConfigurationError

LABELS = ["billing", "Billing", "late bill", "latebill", "7", "007", "12", "é", "[x]"]


def check(what, found, wanted):
    if found != wanted:
        raise AssertionError(f"{what}: {found!r}, expected {wanted!r}")


# Tables that are split


def table_case(draw, folder):
    """A file with doubles and missing cells; rows are divided into three splits."""
    several = draw.random() < 0.3
    texts = [f"text {number}" for number in range(draw.randint(40, 80))]
    names = draw.sample(LABELS, draw.randint(2, 6))
    rows = []
    for text in texts + draw.choices(texts, k=draw.randint(0, 10)):
        label = draw.choice(names[:2]) if draw.random() < 0.8 else draw.choice(names)
        others = draw.sample(names, draw.randint(0, 2))
        rows.append((text, [*dict.fromkeys([label, *others])] if several else label))
    for _ in range(draw.randint(1, 3) if draw.random() < 0.4 else 0):
        place = draw.randrange(len(rows))
        text, label = rows[place]
        missing = [label[0], " "] if several else draw.choice(["", "  "])
        rows[place] = ("", label) if draw.random() < 0.5 else (text, missing)
    path = folder / ("rows.jsonl" if several else "rows.csv")
    with path.open("w", newline="", encoding="utf-8") as file:
        if several:
            file.writelines(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
        else:
            csv.writer(file).writerows([("text", "label"), *rows])
    skip = draw.random() < 0.5
    # The heading of a csv file is row 1.
    first = 1 if several else 2
    wrong = [number for number, (text, label) in enumerate(rows, first) if not text.strip() or is_missing(label)]
    usable = [(text, label) for text, label in rows if text.strip() and not is_missing(label)]
    options = {"form": "classification", "columns": {}, "share": 0.2, "seed": draw.randrange(99)}
    try:
        found = from_files(str(path), None, None, **options, skip_unusable=skip)
    except ConfigurationError as error:
        if wrong and not skip:
            absent = [number for number in wrong if str(number) not in str(error)]
            check("rows that the error leaves out", absent, [])
            return
        raise
    check("accepted in spite of rows", wrong if not skip else [], [])
    check("unusable", found.unusable["train"], len(wrong))
    parts = {
        split: [(row["text"], as_key(row["label"])) for row in rows_of.to_list()] for split, rows_of in found.items()
    }
    together = Counter(pair for part in parts.values() for pair in part)
    check("rows", together, Counter((text, as_key(label)) for text, label in usable))
    texts_of = {split: {text for text, _ in part} for split, part in parts.items()}
    check("texts in two splits", (texts_of["train"] & texts_of["val"]) | (texts_of["val"] & texts_of["test"]), set())
    check("texts of test in train", texts_of["train"] & texts_of["test"], set())
    labels = {one for _, label in usable for one in each(label)}
    check("labels of train", {one for _, label in parts["train"] for one in each(label)}, labels)
    check("order", Classification("minilm", found).labels, sorted(labels))


def each(label):
    return label if isinstance(label, list | tuple) else [label]


def as_key(label):
    return tuple(label) if isinstance(label, list) else label


def is_missing(label):
    return any(not one.strip() for one in each(label))


# Classes of an adapter from which training goes on


def classes_case(draw):
    before = draw.sample(LABELS, draw.randint(2, 6))
    pool = before if draw.random() < 0.6 else LABELS
    rows = {split: [(f"{split} {n}", draw.choice(pool)) for n in range(draw.randint(1, 6))] for split in SPLITS}
    task = Classification("minilm", rows)
    going_on = draw.random() < 0.7
    task.labels_before = before if going_on else []
    trained, *others = ({label for _, label in part} for part in rows.values())
    new = sorted(trained.union(*others) - {*before}) if going_on else sorted(set().union(*others) - trained)
    refused = bool(new) or (not going_on and len(trained) < 2)
    try:
        found = task.labels
    except ConfigurationError as error:
        check("refused", True, refused)
        check("labels that the error leaves out", [name for name in new if repr(name) not in str(error)], [])
        return
    check("refused", False, refused)
    if going_on:
        check("classes", found, before)
    else:
        check("classes", {*found}, trained)


SPLITS = ("train", "val", "test")


# Columns of rows to predict


def columns_case(draw, folder):
    """A file of other columns than training had, in another order, or with more; or it is not known what it had."""
    main, trained = draw.choice(
        [("text", {"text": ["Subject", "Body"], "label": "kind"}), ("text", {"text": "Body", "label": "label"})]
        + [
            ("prompt", {"prompt": "ask", "answer": "output"}),
            ("prompt", {"prompt": ["ask", "more"], "answer": "answer"}),
        ]
    )
    form = "classification" if main == "text" else "completion"
    trained = trained if draw.random() < 0.7 else {}
    wished = each(trained.get(main, main))
    present = [name for name in wished if draw.random() < 0.85]
    extra = ["context", "input", "text", "Subject", "title", "kind", "output", "prompt", "ask", "system"]
    present += draw.sample([name for name in extra if name not in wished], draw.randint(1, 4))
    draw.shuffle(present)
    given = {main: draw.choice(present)} if draw.random() < 0.3 else {}
    cells = [{name: f"{name} {n}" for name in present} for n in range(draw.randint(1, 4))]
    path = folder / draw.choice(["ask.csv", "ask.jsonl"])
    with path.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, present)
            writer.writeheader()
            writer.writerows(cells)
        else:
            file.writelines(json.dumps(row) + "\n" for row in cells)
    used = each(given.get(main, wished))
    missing = [name for name in used if name not in present]
    try:
        rows = _rows(read_source(str(path), "FILE", "test"), form, Inputs(form, trained), given, False)
    except ConfigurationError as error:
        check(f"refused ({error})", bool(missing), True)
        check(f"an error that names no column ({error})", any(repr(name) in str(error) for name in missing), True)
        return
    check("accepted without columns", missing, [])
    check("texts", [row[main] for row in rows.to_list()], ["\n".join(row[name] for name in used) for row in cells])


def judged(seed):
    """(the kind of the case, its fault or "")"""
    draw = random.Random(seed)
    kind = draw.choice(["table", "classes", "columns"])
    before = datasets.config.HF_DATASETS_CACHE
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(name)
        datasets.config.HF_DATASETS_CACHE = str(folder / "cache")
        try:
            if kind == "table":
                table_case(draw, folder)
            elif kind == "classes":
                classes_case(draw)
            else:
                columns_case(draw, folder)
        except AssertionError as error:
            return kind, str(error)
        finally:
            datasets.config.HF_DATASETS_CACHE = before
    return kind, ""
