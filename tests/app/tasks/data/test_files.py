from functools import partial

import datasets
import pytest

from dynrank.app.tasks.data.splits import from_files
from dynrank.errors import ConfigurationError

ROWS = [{"text": f"text, number {i}", "label": "even" if i % 2 == 0 else "odd"} for i in range(200)]


def write(path, rows):
    table = datasets.Dataset.from_list(rows)
    writers = {
        ".csv": table.to_csv,
        ".tsv": partial(table.to_csv, sep="\t"),
        ".json": partial(table.to_json, lines=False),
        ".jsonl": table.to_json,
        ".parquet": table.to_parquet,
    }
    writers[path.suffix](path)
    return str(path)


def checked(train, val=None, *, form="classification", **values):
    """The rows by split."""
    return from_files(train, val, None, form=form, **{"columns": {}, "share": 0.2, "seed": 0, **values})


def read(train, val=None, **values):
    """Texts with their labels by split."""
    found = checked(train, val, **values)
    return {split: [*zip(rows["text"], rows["label"], strict=True)] for split, rows in found.items()}


def all_of(splits):
    return sorted(sum(splits.values(), []))


def pairs(rows):
    return sorted(tuple(row.values()) for row in rows)


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet", "spreadsheet.csv"])
def test_every_row_of_a_file_is_in_one_split(kind, tmp_path):
    file = tmp_path / f"rows.{kind}"
    if kind == "spreadsheet.csv":
        # With semicolons, a mark of the byte order, and another name of the labels.
        lines = [f'"{row["text"]}";{row["label"]}' for row in ROWS]
        file.write_text("\n".join(["text;labels", *lines]), encoding="utf-8-sig")
    else:
        write(file, ROWS)
    splits = read(str(file))
    assert all_of(splits) == pairs(ROWS)
    sizes = {split: len(rows) for split, rows in splits.items()}
    assert sizes == pytest.approx({"train": 120, "val": 40, "test": 40}, abs=15)


def test_cells_are_texts_as_they_stand_there(tmp_path):
    labels = ["01", "1", "007", "NA", "null"]
    texts = ["None", "NA", "null", "1e5", "2024-01-01"]
    rows = [{"text": f"{text} {i}".removesuffix(" 0"), "label": label}
            for i, label in enumerate(labels * 5) for text in texts]  # fmt: skip
    assert all_of(read(write(tmp_path / "a.csv", rows))) == pairs(rows)


def test_paragraphs_of_a_plain_file_are_texts(tmp_path):
    texts = sorted(f"line {i}\nof text" for i in range(50))
    (tmp_path / "a.txt").write_text("\n\n".join(texts), encoding="utf-8-sig")
    found = checked(str(tmp_path / "a.txt"), form="text")
    assert sorted(text for rows in found.values() for text in rows["text"]) == texts


def test_splits_depend_on_seed_and_text_alone(tmp_path):
    def texts(file, seed=0):
        return {split: {text for text, _ in rows} for split, rows in read(file, seed=seed).items()}

    whole, half = (write(tmp_path / f"{n}.csv", ROWS[:n]) for n in (200, 100))
    assert texts(whole) == texts(whole) != texts(whole, seed=1)
    assert all(part <= texts(whole)[split] for split, part in texts(half).items())


def test_every_label_has_a_training_text_and_no_other_text_is_moved(tmp_path):
    common = [{"text": f"t {i}", "label": "common"} for i in range(60)]
    rare = [{"text": f"u {i}", "label": f"rare {i // 2}"} for i in range(30)]
    plain = [{**row, "label": "common"} for row in rare]
    before, after = (
        read(write(tmp_path / f"{name}.jsonl", common + rows), share=0.4)["train"]
        for name, rows in (("plain", plain), ("rare", rare))
    )
    trained = [label for _, label in after]
    moved = [(text, label) for text, label in after if text not in dict(before)]
    assert moved
    assert len(after) == len(before) + len(moved)
    assert {row["label"] for row in rare} <= {*trained}
    assert all(trained.count(label) == 1 for _, label in moved)


def test_no_text_stands_in_two_splits(tmp_path):
    twice = write(tmp_path / "twice.csv", ROWS + ROWS)
    found = [{text for text, _ in rows} for rows in read(twice).values()]
    assert sum(map(len, found)) == len(set.union(*found)) == 200
    splits = read(twice, val=write(tmp_path / "val.csv", ROWS[:50]))
    assert splits["val"] == [tuple(row.values()) for row in ROWS[:50]]
    assert sorted({*splits["train"], *splits["test"]}) == pairs(ROWS[50:])
    assert not {*splits["train"]} & {*splits["test"]}
    with pytest.raises(ConfigurationError, match=r"400 rows, of which 400 .* in the other files, which .* for train"):
        read(twice, val=twice)


def test_columns_of_the_user_are_read_and_several_are_joined(tmp_path):
    rows = [
        {"Subject": "" if i % 3 == 0 else f"about {i}", "Body": f"body\n{i}", "Topic": "ab"[i % 2]} for i in range(40)
    ]
    found = checked(write(tmp_path / "a.csv", rows), columns={"text": ["Subject", "Body"], "label": "Topic"})
    texts = sorted(text for part in found.values() for text in part["text"])
    assert texts == sorted(f"{row['Subject']}\n{row['Body']}".lstrip() for row in rows)
    assert found.columns == {"text": ("Subject", "Body"), "label": "Topic"}


@pytest.mark.parametrize("name", ["org/rows", "org/Rows-2.5"])
def test_names_on_the_hub_are_passed_on(name, monkeypatch):
    hub = {(name, "train"): datasets.Dataset.from_list(ROWS)}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: hub[name, split])
    assert all_of(read(name)) == pairs(ROWS)


LABELLED = b"text,label\nx,a\ny,a\n"
# Each has the name of the file, what is in it, and what the error says: mostly in the words of the library that reads.
BAD = {
    "not UTF-8": ("a.csv", LABELLED + b"caf\xe9,a\n", "can't decode byte 0xe9.*save it as UTF-8"),
    "broken JSON": ("a.jsonl", b'\n{"text": "x", "label": "a"}\n{"text": ', "JSON parse error.* in row 1"),
    "a cell too many": ("a.csv", LABELLED + b"x,y,a\n", "Expected 2 fields in line 4, saw 3"),
    "one name twice": ("a.csv", b"text,text,label\nx,y,a\n", "has two columns 'text'"),
    "one too many in each row": ("a.csv", b"text,label\nx,y,a\n", "row 2 has more cells than the heading: a text that"),
    "no list": ("a.json", b'{"data": [{"text": "x"}]}', r"no column 'text'; it has \['data'\]"),
    "a cell too few": ("a.tsv", b"text\tlabel\nx\ta\ny\n", "row 3: label must be a text that is not blank"),
    "no kind": ("a.doc", b"x", r"must be a file \(.csv, .*, or ORG/NAME on the hub, got "),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_one_message_with_file_row_and_key(case, tmp_path, caplog):
    name, content, said = BAD[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=f"(?s)^data.train.*({said})") as caught:
        checked(str(tmp_path / name))
    assert name in str(caught.value)
    assert not caplog.records


def test_all_faults_of_a_file_are_listed_at_once_with_their_rows(tmp_path):
    rows = [{"text": f"x\n{i}", "label": "" if i % 3 == 0 else "a"} for i in range(90)]
    file = write(tmp_path / "a.csv", rows)
    with open(file, "a") as more:
        more.write('one cell\n,a\n"of\ntwo ""lines""",a\n')
    with pytest.raises(ConfigurationError) as caught:
        read(file)
    # The heading is row 1, and a row may take two lines.
    unlabelled = ", ".join(str(2 + i) for i in range(0, 60, 3))
    assert str(caught.value).splitlines() == [
        f"data.train={file} has rows that cannot be used; correct them, or set data.skip_unusable=true:",
        f"  rows {unlabelled} and 11 more: label must be a text that is not blank, got ''",
        "  row 93: text must be a text that is not blank, got ''",
    ]
    found = checked(file, skip_unusable=True)
    assert (sum(map(len, found.values())), found.left_out["train"]["unusable"]) == (61, 32)
    with pytest.raises(ConfigurationError, match="rows 2, 3: label must be"):
        read(write(tmp_path / "b.csv", [{"text": "x", "label": ""}] * 2), skip_unusable=True)


def test_a_file_that_is_not_there_is_named():
    for name, said in {"": "must be a file .*, or ORG/NAME on the hub, got ''", "none.csv": "does not exist"}.items():
        with pytest.raises(ConfigurationError, match=f"^data.train.*{said}.*; set data.train"):
            read(name)
