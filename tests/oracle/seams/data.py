"""Random tables of users: which rows, classes, weights and losses must a classifier get, and what does predict read?

Each answer is computed anew: rows and labels by loops over the table, the loss and its gradient densely in float64.
"""

import contextlib
import csv
import io
import json
import math
import random
import tempfile
import types
from collections import Counter
from pathlib import Path

import datasets
import torch

from dynrank.adapters.sidecar_files import Inputs
from dynrank.app.commands.predict import _rows
from dynrank.app.tasks import account
from dynrank.app.tasks.classification import Classification, Classifier
from dynrank.app.tasks.data.source import Source
from dynrank.app.tasks.data.splits import from_files
from dynrank.errors import ConfigurationError

LABELS = ["billing", "Billing", "late bill", "latebill", "7", "007", "12", "é", "[x]"]
BLANKS = ["", " ", "\t", "  "]


def check(what, found, wanted):
    if found != wanted:
        raise AssertionError(f"{what}: {found!r}, expected {wanted!r}")


# The loss and its gradient


def dense_loss(logits, labels, smoothing, weights, several):
    """(the loss of a batch, its gradient by the logits), cell by cell."""
    rows, classes = logits.shape
    loss = 0.0
    gradient = torch.zeros(rows, classes, dtype=torch.float64)
    for i in range(rows):
        if several:
            for k in range(classes):
                has = bool(labels[i, k])
                share = 1 / (1 + math.exp(-logits[i, k]))
                wanted = has * (1 - smoothing) + smoothing / 2
                weight = weights[k] if weights is not None and has else 1.0
                loss -= weight * (wanted * math.log(share) + (1 - wanted) * math.log(1 - share)) / (rows * classes)
                gradient[i, k] = weight * (share - wanted) / (rows * classes)
        else:
            total = sum(math.exp(logits[i, k]) for k in range(classes))
            weight = 1.0 if weights is None else weights[int(labels[i])]
            for k in range(classes):
                share = math.exp(logits[i, k]) / total
                wanted = (k == int(labels[i])) * (1 - smoothing) + smoothing / classes
                loss -= weight * wanted * math.log(share) / rows
                gradient[i, k] = weight * (share - wanted) / rows
    return loss, gradient


def loss_case(draw):
    """Weights of a random table, and the loss of a random batch of it."""
    several = draw.random() < 0.4
    names = LABELS[: draw.randint(2, 6)]
    rows = []
    for number in range(draw.randint(12, 40)):
        label = draw.choices(names, [2.0**-i for i in range(len(names))])[0]
        # A label may stand twice in a list.
        labels = sorted([label, draw.choice(names)]) if draw.random() < 0.8 else []
        rows.append((f"text {number}", labels if several else label))
    # Each class has a text.
    rows += [(f"more {name}", [name] if several else name) for name in names]
    task = Classification("minilm", {split: rows for split in ("train", "val", "test")}, class_weights="balanced")
    balanced = draw.random() < 0.7
    counts = Counter(name for _, given in rows for name in ({*given} if several else [given]))
    weights = None
    if balanced:
        absent = [len(rows) - counts[name] for name in task.labels]
        weights = [n / counts[name] or 1.0 for n, name in zip(absent, task.labels, strict=True)]
        if not several:
            weights = [len(rows) / (len(names) * counts[name]) for name in task.labels]
        found = task.weights
        check("weights", [round(w, 9) for w in found], [round(w, 9) for w in weights])
    check("several", task.several, several)
    smoothing = draw.choice([0.0, 0.1, 0.5])
    batch = draw.sample(rows, draw.randint(1, 8))
    logits = torch.tensor([[draw.gauss(0, 2) for _ in names] for _ in batch], dtype=torch.float64, requires_grad=True)
    if several:
        labels = torch.tensor([[float(name in given) for name in task.labels] for _, given in batch]).double()
    else:
        labels = torch.tensor([task.labels.index(given) for _, given in batch])
    module = types.SimpleNamespace(several=several)
    tensor = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    loss = Classifier.loss(module, logits, labels, smoothing, tensor)
    loss.backward()
    wanted, gradient = dense_loss(logits.detach(), labels, smoothing, weights, several)
    check("loss", round(loss.item(), 9), round(wanted, 9))
    if not torch.allclose(logits.grad, gradient, atol=1e-10):
        raise AssertionError(f"gradient {logits.grad}, expected {gradient}")


# Tables that are split


def distinct(label):
    """A row has each of its labels once."""
    return [*dict.fromkeys(label)] if isinstance(label, list) else label


def table_case(draw, folder):
    """A file with blanks, twins, doubles and missing cells; rows are divided into three splits."""
    several = draw.random() < 0.3
    texts = [f"text {number}" for number in range(draw.randint(25, 60))]
    names = draw.sample(LABELS, draw.randint(2, 6))
    rows = []
    for text in texts + draw.choices(texts, k=draw.randint(0, 10)):
        label = draw.choice(names[:2]) if draw.random() < 0.8 else draw.choice(names)
        blank = draw.choice(BLANKS) if draw.random() < 0.2 else ""
        labels = [label, *draw.sample(names, draw.randint(0, 2))] if draw.random() < 0.8 else []
        rows.append((text, [blank + one for one in labels] if several else blank + label + draw.choice([blank, ""])))
    faulty = draw.random() < 0.4
    for _ in range(draw.randint(1, 3) if faulty else 0):
        place = draw.randrange(len(rows))
        text, label = rows[place]
        missing = [label, " "] if several else draw.choice(["", "  "])
        rows[place] = ("", label) if draw.random() < 0.5 else (text, missing)
    if several:
        rows = [(text, [one for one in label if isinstance(one, str)]) for text, label in rows]
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
    usable = [(text, distinct(stripped(label))) for text, label in rows if text.strip() and not is_missing(label)]
    try:
        found = from_files(
            str(path),
            None,
            None,
            form="classification",
            columns={},
            share=0.2,
            seed=draw.randrange(99),
            skip_unusable=skip,
        )
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
    for split, part in parts.items():
        check(f"ambiguous in {split}", dict(found.ambiguous[split]), ambiguous(part))
    said = remarks_of(found, parts)
    counts = Counter(one for part in parts.values() for _, label in part for one in each(label))
    twins = Counter("".join(label.casefold().split()) for label in labels)
    strange = {label for label in labels if counts[label] == 1 or twins["".join(label.casefold().split())] > 1}
    check("classes with a remark", said, strange | {one for part in parts.values() for one in ambiguous(part)})
    order = Classification("minilm", found).labels
    numbers = [label for label in labels if label.isdecimal() and (label == "0" or label[0] != "0")]
    check("order", order, sorted(numbers, key=int) + sorted(labels - {*numbers}))


def each(label):
    return label if isinstance(label, list | tuple) else [label]


def as_key(label):
    return tuple(label) if isinstance(label, list) else label


def stripped(label):
    return [one.strip() for one in label] if isinstance(label, list) else label.strip()


def is_missing(label):
    return any(not one.strip() for one in each(label))


def ambiguous(rows):
    """{label: number of the texts that have it in some of their rows, and not in others}"""
    of_text = {}
    for text, label in rows:
        of_text.setdefault(text, []).append({*each(label)})
    found = Counter(one for sets in of_text.values() for one in set().union(*sets) if any(one not in s for s in sets))
    return dict(found)


def remarks_of(found, parts):
    """The classes about which the printed table says something."""
    made = []
    for split, part in parts.items():
        classes = dict(Counter(one for _, label in part for one in each(label)))
        counts = {"rows": len(part), "examples": len(part), "tokens": 0, "max_length": 8}
        made.append(account.SplitAccount(**counts, classes=classes, ambiguous=dict(found.ambiguous[split])))
    return {*account._remarks(made)}


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


# Names by which a column is found where training rows were tuples, the first one first; others are not in the cases.
USUAL = {"text": ["text"], "prompt": ["prompt", "instruction", "question", "input", "query"]}


def columns_case(draw, folder):
    """A file of other columns than training had, in another order, or with more; or training rows were tuples."""
    form = draw.choice(["classification", "completion", "text"])
    trained = {
        "classification": draw.choice([{"text": ["Subject", "Body"]}, {"text": "Body"}, {"text": "text"}]),
        "completion": {"prompt": draw.choice(["instruction", "ask", ["ask", "more"]])},
        "text": {"text": "content"},
    }[form]
    if form == "completion" and draw.random() < 0.5:
        trained = trained | {"input": draw.choice(["input", "facts"])}
    of_tuples = draw.random() < 0.3
    if of_tuples:
        trained = {}
    main = "prompt" if form == "completion" else "text"
    answer = {"classification": {"label": "kind"}, "completion": {"answer": "output"}, "text": {}}[form]
    needed = [name for theirs in trained.values() for name in each(theirs)]
    extra = ["context", "input", "text", "Subject", "title", "kind", "query", "output", "prompt", "system"]
    wished = needed or [main]
    present = [name for name in wished if draw.random() < 0.85]
    present += draw.sample([name for name in extra if name not in wished], draw.randint(0, 4))
    present = present or ["other"]
    draw.shuffle(present)
    given = {}
    if draw.random() < 0.3:
        ours = draw.choice([*trained] or [main, *(["input"] if form == "completion" else [])])
        given[ours] = draw.choice(present)
    elif "input" in trained and draw.random() < 0.4:
        given["input"] = ""
    cells = [{name: f"{name} {n}" for name in present} for n in range(draw.randint(1, 4))]
    path = folder / draw.choice(["ask.csv", "ask.jsonl"])
    with path.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, present)
            writer.writeheader()
            writer.writerows(cells)
        else:
            file.writelines(json.dumps(row) + "\n" for row in cells)
    used = {ours: theirs for ours, theirs in (trained | given).items() if theirs}
    if of_tuples:
        # The user's name of the text comes first.
        used = {main: next((name for name in USUAL[main] if name in present), main)} | used
    missing = [name for ours, theirs in used.items() for name in each(theirs) if name not in present]
    learned = Inputs(form, {} if of_tuples else trained | answer)
    try:
        rows = _rows(Source(str(path), "FILE", "test"), form, learned, given, False)
    except ConfigurationError as error:
        check(f"refused ({error})", bool(missing), True)
        said = [main if of_tuples else repr(name) for name in missing]
        check(f"an error that names no column ({error})", any(name in str(error) for name in said), True)
        return
    check("accepted without columns", missing, [])
    found = [row["prompt" if form == "completion" else "text"] for row in rows.to_list()]
    wanted = []
    for row in cells:
        parts = [row[name] for name in each(used[main])]
        wanted.append("\n".join([*parts, *([row[used["input"]]] if "input" in used else [])]))
    check("texts", found, wanted)


def judged(seed):
    """(the kind of the case, its fault or "")"""
    draw = random.Random(seed)
    kind = draw.choice(["loss", "table", "classes", "columns"])
    before = datasets.config.HF_DATASETS_CACHE
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(name)
        datasets.config.HF_DATASETS_CACHE = str(folder / "cache")
        try:
            if kind == "loss":
                loss_case(draw)
            elif kind == "table":
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
