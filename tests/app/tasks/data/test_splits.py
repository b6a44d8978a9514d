import hashlib

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from dynrank.app.tasks.data.splits import place, rows_by_split
from dynrank.errors import ConfigurationError

PAIRS = {"train": [("a", "x"), ("b", "y")], "val": [("c", "x")], "test": [("d", "y")]}


def dataset(rows, **features):
    columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows], "source": ["web"] * len(rows)}
    return Dataset.from_dict(columns, Features({"source": Value("string"), "text": Value("string"), **features}))


def of_classes(rows):
    return dataset([(text, "yx".index(label)) for text, label in rows], label=ClassLabel(names=["y", "x"]))


KINDS = {
    "lists": PAIRS,
    "a function": lambda: PAIRS,
    "data sets": DatasetDict({name: dataset(rows, label=Value("string")) for name, rows in PAIRS.items()}),
    "data sets with classes": {name: of_classes(rows) for name, rows in PAIRS.items()},
    "one split more": {**PAIRS, "unsupervised": []},
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_same_whatever_holds_them(kind):
    found = rows_by_split(KINDS[kind], "classification")
    assert {split: [*zip(rows["text"], rows["label"], strict=True)] for split, rows in found.items()} == PAIRS


def test_a_text_alone_is_no_row():
    with pytest.raises(ConfigurationError, match=r"row 1: it must be a mapping or a tuple \('text',\), got 'a text'"):
        rows_by_split(dict.fromkeys(("train", "val", "test"), ["a text", ("another",)]), "text")


REFUSED = {
    "a split too few": ({"train": [("a", "x")], "validation": [("a", "x")]}, "val.*validation.*set data"),
    "an empty split": ({**PAIRS, "val": []}, r"val must be a list of rows .*, got \[\]"),
    "a row of one": (
        {**PAIRS, "test": [("a", "x"), ("b",)]},
        r"(?s)test .*row 2: it must be .*tuple \('text', 'label'\), got \('b',\)",
    ),
    "a broken number": ({**PAIRS, "train": [("a", "x"), ("a", 0.5)]}, r"(?s)train .*row 2: label must be .*0\.5"),
    "no rows at all": ({**PAIRS, "val": None}, "val must be a list of rows .*, got None; set data"),
    "other names": (
        {**PAIRS, "val": [{"a": "x", "label": "y"}]},
        "val has no column 'text'; it has .*; rename one",
    ),
    "a class of -1": (
        {**PAIRS, "val": dataset([("a", -1)], label=ClassLabel(names=["x"]))},
        "(?s)val .*row 1: label must be",
    ),
    "a number as a text": (
        {**PAIRS, "train": [(3, "x")]},
        "(?s)train .*row 1: text must be a text that is not blank, got 3",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_data_that_cannot_be_used_are_named(case):
    data, named = REFUSED[case]
    with pytest.raises(ConfigurationError, match=named):
        rows_by_split(data, "classification")


def test_place_depends_on_seed_and_key_alone_and_keeps_the_shares():
    def split(key, seed):
        share = int(hashlib.sha256(f"{seed}:{key}".encode()).hexdigest()[:16], 16) / 2**64
        return "train" if share < 0.7 else "val" if share < 0.8 else "test"

    places = [place(f"text {i}", 3, 0.7, 0.8) for i in range(2000)]
    assert places == [split(f"text {i}", 3) for i in range(2000)]
    assert [places.count(name) / 2000 for name in ("train", "val", "test")] == pytest.approx([0.7, 0.1, 0.2], abs=0.03)
