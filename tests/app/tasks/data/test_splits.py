import hashlib

import pytest
from datasets import Dataset, DatasetDict

from dynrank.app.tasks.data.splits import place, rows_by_split
from dynrank.errors import ConfigurationError

ROWS = {
    split: [{"source": "web", "label": label, "text": text} for text, label in rows]
    for split, rows in {"train": ["ax", "by"], "val": ["cx"], "test": ["dy"]}.items()
}
KINDS = {
    "lists": ROWS,
    "a function": lambda: ROWS,
    "data sets and one more": DatasetDict({name: Dataset.from_list(rows) for name, rows in [*ROWS.items(), ("x", [])]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_same_whatever_holds_them(kind):
    found = rows_by_split(KINDS[kind], "classification")
    texts = {split: [*zip(rows["label"], rows["text"], strict=True)] for split, rows in found.items()}
    assert texts == {split: [(row["label"], row["text"]) for row in rows] for split, rows in ROWS.items()}


REFUSED = {
    "a split too few": ({"train": ROWS["train"], "validation": ROWS["val"]}, "val.*validation.*set data"),
    "an empty split": ({**ROWS, "val": []}, r"val must be .* a list of mappings.*, got \[\]"),
    "tuples": ({**ROWS, "test": [("a", "x")]}, r"test must be .* a list of mappings.*, got \[\('a', 'x'\)\]; set data"),
    "a broken number": (
        {**ROWS, "train": [{"text": "a", "label": 1.0}, {"text": "a", "label": 0.5}]},
        r"(?s)train .*row 2: label must be .*0\.5",
    ),
    "other names": ({**ROWS, "val": [{"a": "x", "label": "y"}]}, "val has no column 'text'; it has .*; rename one"),
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
