import csv
import json

import datasets
import pytest

import dynrank
from dynrank.errors import ConfigurationError
from dynrank.run.job import build
from dynrank.tasks.data.files import from_files
from dynrank.tasks.data.splits import pairs_by_split

ROWS = [{"text": f"text, number {i}", "label": "even" if i % 2 == 0 else "odd"} for i in range(200)]
NAMES = {"text": "text", "label": "label", "prompt": "prompt", "answer": "answer"}


def write(path, rows):
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = "\n".join(map(json.dumps, rows))
        path.write_text(json.dumps(rows) if path.suffix == ".json" else lines)
    return str(path)


def read(train, val=None, test=None, **values):
    settings = {"columns": NAMES, "share": 0.2, "seed": 0, **values}
    return pairs_by_split(from_files(train, val, test, **settings), ("text", "label"), str)


def pairs(rows):
    return sorted(tuple(row.values()) for row in rows)


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_every_row_of_a_file_is_in_one_split(kind, tmp_path, monkeypatch):
    home = tmp_path / "home"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(home))
    splits = read(write(tmp_path / f"rows.{kind}", ROWS))
    assert sorted(sum(splits.values(), [])) == pairs(ROWS)
    assert {split: len(rows) for split, rows in splits.items()} == pytest.approx(
        {"train": 120, "val": 40, "test": 40}, abs=15
    )
    assert not home.exists()


def test_splits_depend_on_seed_and_text_alone(tmp_path):
    whole, half = (write(tmp_path / f"{n}.csv", ROWS[:n]) for n in (200, 100))
    assert read(whole) == read(whole) != read(whole, seed=1)
    assert all(set(rows) <= set(read(whole)[split]) for split, rows in read(half).items())


def test_no_text_stands_in_two_splits(tmp_path):
    twice = write(tmp_path / "twice.csv", ROWS + ROWS)
    found = [{text for text, _ in rows} for rows in read(twice).values()]
    assert sum(map(len, found)) == len(set.union(*found)) == 200
    splits = read(twice, val=write(tmp_path / "val.csv", ROWS[:50]))
    assert splits["val"] == [tuple(row.values()) for row in ROWS[:50]]
    assert sorted({*splits["train"], *splits["test"]}) == pairs(ROWS[50:])
    assert not {*splits["train"]} & {*splits["test"]}


def test_columns_go_by_the_names_of_the_user(tmp_path):
    renamed = [{"review": row["text"], "stars": row["label"]} for row in ROWS]
    file = write(tmp_path / "renamed.csv", renamed)
    assert read(file, columns={**NAMES, "text": "review", "label": "stars"}) == read(write(tmp_path / "a.csv", ROWS))


@pytest.mark.parametrize("name", [None, "none.csv", "rows.txt", "broken.json", "broken.parquet", "empty.csv"])
def test_file_that_cannot_be_read_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("rows.txt", "broken.json", "broken.parquet", "empty.csv"):
        (tmp_path / file).write_text("" if file == "empty.csv" else "broken")
    with pytest.raises(ConfigurationError, match=rf"data\.train.*{name}"):
        read(name)


def test_task_classification_takes_a_file(tiny_bert, tmp_path):
    file = write(tmp_path / "rows.csv", [{"text": row["text"], "class": row["label"]} for row in ROWS])
    options = ["task=classification", f"data.train={file}", "data.columns.label=class", f"task.model={tiny_bert}"]
    task = build(dynrank.compose([*options, "debug=smoke", "plots=false"]), on_meta=True).task
    task.setup("fit")
    assert task.labels == ["even", "odd"]
    assert {split: len(rows) for split, rows in task.examples.items()}["train"] == 64
    no_file = dynrank.compose(["task=classification", f"task.model={tiny_bert}", "plots=false"])
    with pytest.raises(ConfigurationError, match=r"set data\.train"):
        build(no_file, on_meta=True)
