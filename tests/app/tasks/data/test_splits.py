import hashlib

import pytest
from datasets import Dataset, DatasetDict

from dynrank.app.tasks.data.splits import place, rows_by_split
from dynrank.errors import ConfigurationError

PAIRS = {"train": [("a", "x"), ("b", "y")], "val": [("c", "x")], "test": [("d", "y")]}


def dataset(rows):
    return Dataset.from_list([{"source": "web", "label": label, "text": text} for text, label in rows])


KINDS = {
    "lists": PAIRS,
    "a function": lambda: PAIRS,
    "data sets": DatasetDict({name: dataset(rows) for name, rows in PAIRS.items()}),
    "one split more": {**PAIRS, "unsupervised": []},
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_same_whatever_holds_them(kind):
    found = rows_by_split(KINDS[kind], "classification")
    assert {split: [*zip(rows["text"], rows["label"], strict=True)] for split, rows in found.items()} == PAIRS


REFUSED = {
    "a split too few": ({"train": [("a", "x")], "validation": [("a", "x")]}, "val.*validation.*set data"),
    "an empty split": ({**PAIRS, "val": []}, r"val must be a list of rows .*, got \[\]"),
    "a row of one": (
        {**PAIRS, "test": [("a", "x"), ("b",), "cd"]},
        r"(?s)test .*row 2: it must be .*tuple \('text', 'label'\), got \('b',\)\n  row 3: .* got 'cd'",
    ),
    "a broken number": ({**PAIRS, "train": [("a", "x"), ("a", 0.5)]}, r"(?s)train .*row 2: label must be .*0\.5"),
    "no rows at all": ({**PAIRS, "val": None}, "val must be a list of rows .*, got None; set data"),
    "other names": (
        {**PAIRS, "val": [{"a": "x", "label": "y"}]},
        "val has no column 'text'; it has .*; rename one",
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
