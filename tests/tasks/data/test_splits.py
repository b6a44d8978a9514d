import hashlib

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from dynrank.errors import ConfigurationError
from dynrank.tasks.data.splits import pairs_by_split, place

COLUMNS = ("text", "label")
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
def test_pairs_are_the_same_whatever_holds_them(kind):
    assert pairs_by_split(KINDS[kind], COLUMNS, str) == PAIRS


REFUSED = {
    "no split": (["a"], r"\['a'\]"),
    "a split too few": ({"train": [("a", "x")], "validation": [("a", "x")]}, "val.*validation"),
    "an empty split": ({**PAIRS, "val": []}, "rows of val must be a text .* and its label"),
    "a row of one": ({**PAIRS, "test": [("a", "x"), ("b",)]}, r"test .*\('b',\)"),
    "no text": ({**PAIRS, "train": [(None, "x")]}, r"train .*\(None, 'x'\)"),
    "a number": ({**PAIRS, "train": [("a", 3)]}, r"train .*label \(str\), got \('a', 3\)"),
    "other columns": ({**PAIRS, "train": Dataset.from_dict({"text": ["a"], "class": ["x"]})}, "label.*class"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_data_that_cannot_be_used_are_named(case):
    data, named = REFUSED[case]
    with pytest.raises(ConfigurationError, match=f"{named}.*set data"):
        pairs_by_split(data, COLUMNS, str)


def test_place_depends_on_seed_and_key_alone_and_keeps_the_shares():
    def split(key, seed):
        share = int(hashlib.sha256(f"{seed}:{key}".encode()).hexdigest()[:16], 16) / 2**64
        return "train" if share < 0.7 else "val" if share < 0.8 else "test"

    places = [place(f"text {i}", 3, 0.7, 0.8) for i in range(2000)]
    assert places == [split(f"text {i}", 3) for i in range(2000)]
    assert [places.count(name) / 2000 for name in ("train", "val", "test")] == pytest.approx([0.7, 0.1, 0.2], abs=0.03)
