import csv
import json

import datasets
import pytest

import dynrank
from dynrank.errors import ConfigurationError
from dynrank.run.job import build
from dynrank.tasks.data.files import from_files

ROWS = [{"text": f"text, number {i}", "label": "even" if i % 2 == 0 else "odd"} for i in range(200)]


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
    settings = {"form": "classification", "columns": {}, "share": 0.2, "seed": 0, **values}
    found = from_files(train, val, test, **settings)
    return {split: [*zip(rows["text"], rows["label"], strict=True)] for split, rows in found.items()}


def pairs(rows):
    return sorted(tuple(row.values()) for row in rows)


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_every_row_of_a_file_is_in_one_split(kind, tmp_path):
    splits = read(write(tmp_path / f"rows.{kind}", ROWS))
    assert sorted(sum(splits.values(), [])) == pairs(ROWS)
    sizes = {split: len(rows) for split, rows in splits.items()}
    assert sizes == pytest.approx({"train": 120, "val": 40, "test": 40}, abs=15)


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


@pytest.mark.parametrize("given", [{}, {"text": "review"}, {"text": "review", "label": "Stars"}])
def test_columns_are_found_and_said(given, tmp_path, capsys):
    label = given.get("label", "Topic")
    renamed = [{"id": i, "review": row["text"], label: row["label"]} for i, row in enumerate(ROWS)]
    found = read(write(tmp_path / "renamed.csv", renamed), columns={"label": None, **given})
    assert capsys.readouterr().out.split() == ["columns", "text", "<-", "review,", "label", "<-", label]
    assert found == read(write(tmp_path / "a.csv", ROWS))


def test_a_folder_has_its_own_splits(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for split, part in (("train", ROWS[:150]), ("validation", ROWS[150:])):
        write(folder / f"{split}.jsonl", part)
    found = read(str(folder), val=str(folder))
    assert found["val"] == [tuple(row.values()) for row in ROWS[150:]]
    assert sorted(found["train"] + found["test"]) == pairs(ROWS[:150])


def test_paragraphs_of_a_plain_file_are_texts(tmp_path):
    texts = sorted(f"line {i}\nof text" for i in range(50))
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    parts = from_files(str(tmp_path / "a.txt"), None, None, form="text", columns={}, share=0.2, seed=0)
    assert sorted(text for part in parts.values() for text in part["text"]) == texts


def lines(*rows, count=30, **shape):
    """JSONL of good rows and then of these."""
    shape = json.dumps(shape or {"text": "text NUMBER", "label": "a"})
    good = [shape.replace("NUMBER", str(i)) for i in range(count)]
    return "\n".join([*good, *(row if isinstance(row, str) else json.dumps(row) for row in rows)]).encode()


PROMPTED = {"prompt": "p NUMBER", "answer": "a"}
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
TALKS = CHAT["messages"]
BAD = {  # form, name of the file, what is in it, what the error says beside the file
    "not UTF-8": ("classification", "a.csv", "text,label\nfine,a\ncaf\xe9,b\n".encode("latin-1"), "line 3 is not UTF"),
    "no UTF-8 in JSON": ("classification", "a.jsonl", lines() + b'\n{"text": "\xff"}', "line 31 is not UTF-8"),
    "broken JSON": ("classification", "a.jsonl", lines('{"text": ', count=16), "line 17 is no JSON"),
    "a row without a label": ("classification", "a.csv", b"text,label\nx,1\ny,2\nz,\n", "row 3 has no label"),
    "a null label": ("classification", "a.jsonl", lines({"text": "x", "label": None}), "row 31 has no label"),
    "a label seen once": ("classification", "a.jsonl", lines({"text": "x", "label": "b"}), "row 31 alone .* 'b'"),
    "an empty text": ("classification", "a.jsonl", lines({"text": " ", "label": "a"}), "row 31 has an empty text"),
    "an empty answer": ("completion", "a.jsonl", lines({"prompt": "x", "answer": ""}, **PROMPTED), "row 31 has an em"),
    "0 rows": ("classification", "a.csv", b"text,label\n", "it has 0 rows"),
    "0 bytes": ("classification", "a.csv", b"", "it is empty"),
    "no column": ("completion", "a.jsonl", lines(), r"no prompt column .*\['text', 'label'\]; set data.columns.prompt"),
    "a row too long": ("classification", "a.csv", b"text,label\na,b\nc,d,e\n", "line 3|row 2"),
    "the assistant first": ("chat", "a.jsonl", lines({"messages": TALKS[1:]}, **CHAT), "row 31 .*starts with the ass"),
    "nobody answers": ("chat", "a.jsonl", lines({"messages": TALKS[:1]}, **CHAT), "row 31 .*without a turn"),
    "a silent user": ("chat", "a.jsonl", lines({"messages": [{**TALKS[0], "content": ""}]}, **CHAT), "row 31 .*user"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_one_line_with_file_row_and_key(case, tmp_path, caplog):
    form, name, content, said = BAD[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=rf"data\.train=.*{name}.*({said})") as caught:
        from_files(str(tmp_path / name), None, None, form=form, columns={}, share=0.2, seed=0)
    assert "\n" not in str(caught.value)
    assert not caplog.records  # nothing beside it


def test_a_column_that_is_not_there_is_named(tmp_path):
    file = write(tmp_path / "a.csv", ROWS)
    with pytest.raises(ConfigurationError, match=r"a\.csv has no column 'body'; it has .*; set data\.columns\.text"):
        read(file, columns={"text": "body"})


@pytest.mark.parametrize("name", [None, "", "none.csv", "rows.doc", "broken.json", "broken.parquet"])
def test_file_that_cannot_be_read_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("rows.doc", "broken.json", "broken.parquet"):
        (tmp_path / file).write_text("broken")
    with pytest.raises(ConfigurationError, match=rf"data\.train.*{name}"):
        read(name)


def test_task_classification_takes_a_file(tiny_bert, tmp_path):
    file = write(tmp_path / "rows.csv", [{"text": row["text"], "class": row["label"]} for row in ROWS])
    options = ["task=classification", f"data.train={file}", "data.columns.label=class", f"task.model={tiny_bert}"]
    task = build(dynrank.compose([*options, "debug=smoke", "plots=false"]), on_meta=True).task
    task.setup("fit")
    assert task.labels == ["even", "odd"]
    assert len(task.examples["train"]) == 64
    no_file = dynrank.compose(["task=classification", f"task.model={tiny_bert}", "plots=false"])
    with pytest.raises(ConfigurationError, match=r"set data\.train"):
        build(no_file, on_meta=True)
