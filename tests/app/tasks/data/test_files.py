import csv
import json
import re

import datasets
import pytest

from dynrank.app.tasks.data import headings, source
from dynrank.app.tasks.data.splits import from_files, rows_by_split
from dynrank.errors import ConfigurationError
from dynrank.output.whole_file import DISK_FULL

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


def checked(train, val=None, *, form="classification", **values):
    """The rows by split."""
    return from_files(train, val, None, form=form, **{"columns": {}, "share": 0.2, "seed": 0, **values})


def read(train, val=None, **values):
    """Texts with their labels by split."""
    found = checked(train, val, **values)
    return {split: [*zip(rows["text"], rows["label"], strict=True)] for split, rows in found.items()}


def all_of(splits):
    return sorted(sum(splits.values(), []))


def column(splits, name):
    """A column of all splits, sorted."""
    return sorted(value for part in splits.values() for value in part[name])


def pairs(rows):
    return sorted(tuple(row.values()) for row in rows)


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_every_row_of_a_file_is_in_one_split(kind, tmp_path):
    splits = read(write(tmp_path / f"rows.{kind}", ROWS))
    assert all_of(splits) == pairs(ROWS)
    sizes = {split: len(rows) for split, rows in splits.items()}
    assert sizes == pytest.approx({"train": 120, "val": 40, "test": 40}, abs=15)


def test_rows_in_a_json_file_are_a_list_alone_or_in_an_object_or_lines(tmp_path):
    lines = [json.dumps(row) for row in ROWS]
    for name, content in (
        ("a.json", json.dumps({"version": "1", "data": ROWS}, indent=1)),
        ("b.json", "\n".join(lines)),
        ("a.JSONL", "\ufeff\n\n" + "\n\n".join(lines)),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert all_of(read(str(tmp_path / name))) == pairs(ROWS)


def test_splits_without_classes_depend_on_seed_and_text_alone(tmp_path):
    def texts(file, seed=0):
        return {split: set(rows["text"]) for split, rows in checked(file, form="text", seed=seed).items()}

    whole, half = (write(tmp_path / f"{n}.csv", ROWS[:n]) for n in (200, 100))
    assert texts(whole) == texts(whole) != texts(whole, seed=1)
    assert all(part <= texts(whole)[split] for split, part in texts(half).items())


@pytest.mark.parametrize("share", [0.1, 0.25, 0.4])
def test_each_split_has_its_share_of_each_class(share, tmp_path):
    sizes = {"rare": 18, "common": 400, "pair": 2, "some": 61}
    rows = [{"text": f"{label} {i}", "label": label} for label, size in sizes.items() for i in range(size)]
    splits = read(write(tmp_path / "a.csv", rows + rows), share=share)
    assert (
        splits
        == read(write(tmp_path / "b.csv", rows + rows), share=share)
        != read(write(tmp_path / "c.csv", rows + rows), share=share, seed=1)
    )
    for label, size in sizes.items():
        counts = {split: len({text for text, own in pairs if own == label}) for split, pairs in splits.items()}
        assert sum(counts.values()) == size
        assert abs(counts["val"] - share * size) <= 1
        assert abs(counts["test"] - share * size) <= 1
        assert counts["train"] >= 1


def test_of_several_labels_the_rarest_is_spread_alike(tmp_path):
    rows = [{"text": f"text {i}", "label": ["all", *(["rare"] if i % 20 == 0 else [])]} for i in range(400)]
    splits = read(write(tmp_path / "a.jsonl", rows), share=0.2)
    counts = {split: sum("rare" in labels for _, labels in pairs) for split, pairs in splits.items()}
    assert counts == pytest.approx({"train": 12, "val": 4, "test": 4}, abs=1)


@pytest.mark.parametrize("several", [False, True])
def test_blanks_around_labels_go_and_are_said_once(several, tmp_path, capsys):
    labels = [" even" if i % 10 == 0 else "odd\t" if i % 10 == 1 else row["label"] for i, row in enumerate(ROWS)]
    rows = [{**row, "label": [own] if several else own} for row, own in zip(ROWS, labels, strict=True)]
    clean = [{**row, "label": [row["label"]] if several else row["label"]} for row in ROWS]
    val = write(tmp_path / "val.jsonl", rows[:10])
    assert read(write(tmp_path / "a.jsonl", rows), val=val) == read(write(tmp_path / "b.jsonl", clean), val=val)
    said = capsys.readouterr().out
    # Those of the training file, and twice those of the validation file.
    assert re.findall(r"blanks +around the labels of (\d+) rows are left out", said) == ["40", "2", "2"]
    data = dict.fromkeys(("train", "val", "test"), rows)
    assert rows_by_split(data, "classification")["train"]["label"][:] == [row["label"] for row in clean]


@pytest.mark.parametrize("flag", [int, float, bool])
def test_a_vector_with_a_flag_for_each_class_is_no_list_of_labels(flag, tmp_path):
    """As transformers wants them where a text may have several labels."""
    rows = [{"text": f"t {i}", "label": [flag(i % k == 0) for k in (2, 3, 5)]} for i in range(60)]
    with pytest.raises(
        ConfigurationError, match=r"vectors of 0 and 1 in its column 'label', such as \[.*list of the lab"
    ):
        checked(write(tmp_path / "flags.jsonl", rows))
    # Of two classes, one for each text.
    one_hot = [{**row, "label": [flag(i % 2), flag(1 - i % 2)]} for i, row in enumerate(rows)]
    with pytest.raises(ConfigurationError, match="vectors of 0 and 1"):
        checked(write(tmp_path / "two.jsonl", one_hot))
    # Numbers of the labels, of which a row has two.
    for row, i in zip(rows, range(60), strict=True):
        row["label"] = [i % 2, 2 + i % 3]
    found = column(checked(write(tmp_path / "numbers.jsonl", rows)), "label")
    assert found == sorted([str(i % 2), str(2 + i % 3)] for i in range(60))


def test_texts_of_several_columns_are_joined(tmp_path, capsys):
    rows = [
        {"Subject": "" if i % 3 == 0 else f"about {i}", "Body": f"body\n{i}", "label": "ab"[i % 2]} for i in range(40)
    ]
    found = checked(write(tmp_path / "a.csv", rows), columns={"text": ["Subject", "Body"]})
    assert "text <- Subject + Body, label <- label" in capsys.readouterr().out
    assert column(found, "text") == sorted(f"{row['Subject']}\n{row['Body']}".lstrip() for row in rows)


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


@pytest.mark.parametrize("given", [{}, {"text": "review"}, {"text": "review", "label": "Stars"}])
def test_columns_are_found_and_said(given, tmp_path, capsys):
    label = given.get("label", "Topic")
    renamed = [{"review": row["text"], label: row["label"], "history": i, "id": i} for i, row in enumerate(ROWS)]
    found = read(write(tmp_path / "renamed.csv", renamed), columns={"label": None, **given})
    _, *said = capsys.readouterr().out.splitlines()
    assert said == [f"columns          text <- review, label <- {label}", "not used         history, id"]
    assert found == read(write(tmp_path / "a.csv", ROWS))


def test_other_files_are_read_by_the_columns_of_the_training_file(tmp_path, capsys):
    rows = [{"prompt": f"q {i}", "answer": f"a {i}"} for i in range(40)]
    more = [{"instruction": "no", "context": "note", **row} for row in rows[:3]]
    options = {"form": "completion", "columns": {"prompt": None}}
    files = write(tmp_path / "train.csv", rows[5:]), write(tmp_path / "val.csv", more)
    assert checked(*files, **options)["val"]["prompt"][:] == ["q 0", "q 1", "q 2"]
    assert capsys.readouterr().out.count("columns ") == 1
    data = {"train": rows[5:], "val": more, "test": rows[4:5]}
    made = rows_by_split(data, "completion")
    assert made["val"]["prompt"][:] == ["q 0", "q 1", "q 2"]
    assert made.columns == {"prompt": "prompt", "answer": "answer"}
    # The rows of a val file may lack what only some rows of the training file have.
    with_input = write(tmp_path / "inputs.csv", [{**row, "input": "i"} for row in rows[5:]])
    assert checked(with_input, write(tmp_path / "b.csv", rows[:3]), **options)["val"]["prompt"][:] == [
        "q 0",
        "q 1",
        "q 2",
    ]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("columns")]
    assert said == [
        "columns          prompt <- prompt, answer <- answer, input <- input",
        "columns          prompt <- prompt, answer <- answer",
    ]


def test_an_optional_column_is_read_wherever_it_begins(tmp_path):
    """Two collections in one folder, or one after the other in one file."""
    without = [{"prompt": f"q {i}", "answer": "a"} for i in range(source.SNIFFED)]
    rows = [{"prompt": f"q {i}", "answer": "a", "input": f"on {i}"} for i in range(50)]
    (tmp_path / "both").mkdir()
    write(tmp_path / "both" / "a.jsonl", without)
    write(tmp_path / "both" / "b.jsonl", rows)
    options = {"form": "completion", "columns": {}}
    found = checked(str(tmp_path / "both"), **options)
    assert column(found, "prompt") == sorted([row["prompt"] for row in without] + [f"q {i}\non {i}" for i in range(50)])
    file = write(tmp_path / "one.jsonl", [*without, *rows])
    assert column(checked(file, **options), "prompt") == column(found, "prompt")
    found = checked(file, form="completion", columns={"input": ""})
    assert column(found, "prompt") == sorted(row["prompt"] for row in [*without, *rows])


def test_a_name_that_the_form_does_not_read_is_refused(tmp_path):
    with pytest.raises(
        ConfigurationError, match=r"data\.columns must name one of .*'label', 'text'.* got \['answer'\]"
    ):
        checked(write(tmp_path / "a.csv", ROWS), columns={"answer": "label", "prompt": None})


def test_commas_in_a_quoted_heading_are_no_delimiters(tmp_path):
    lines = [f'"{row["text"]}";{row["label"]}' for row in ROWS]
    (tmp_path / "a.csv").write_text("\n".join(['"so, or, so";label', *lines]))
    assert all_of(read(str(tmp_path / "a.csv"), columns={"text": "so, or, so"})) == pairs(ROWS)


@pytest.mark.parametrize("name", ["org/rows", "org/Rows-2.5"])
def test_names_on_the_hub_are_passed_on(name, monkeypatch):
    hub = {(name, "train"): datasets.Dataset.from_list(ROWS)}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: hub[name, split])
    monkeypatch.setattr(source, "hub_answers", lambda name, repo_type: True)
    assert all_of(read(name)) == pairs(ROWS)


def test_a_name_on_the_hub_is_refused_at_once_where_there_is_no_network(no_network):
    with pytest.raises(ConfigurationError, match=r"data\.train=org/rows cannot be read.*reached.*HF_HUB_OFFLINE=1"):
        read("org/rows")
    assert len(no_network) < 3


def test_a_full_disk_under_the_cache_is_no_fault_of_the_file(tmp_path, request):
    write(tmp_path / "a.jsonl", ROWS)
    request.getfixturevalue("full_disk")
    with pytest.raises(ConfigurationError, match=r"stored in the cache of datasets.*; free space.*HF_HOME") as caught:
        read(str(tmp_path / "a.jsonl"))
    # By this, the command exits with code 1.
    assert caught.value.__cause__.errno in DISK_FULL


def test_a_folder_has_its_own_splits_and_no_script_in_it_is_run(tmp_path):
    folder = tmp_path / "talk [1]"
    folder.mkdir()
    (folder / "talk.py").write_text("raise AssertionError('it was run')")
    write(folder / "train.jsonl", ROWS[:150])
    with pytest.raises(ConfigurationError, match=r"data\.val=.*talk.*no files .*for validation"):
        read(str(folder), val=str(folder))
    write(folder / "validation.jsonl", ROWS[150:])
    found = read(str(folder), val=str(folder))
    assert found["val"] == [tuple(row.values()) for row in ROWS[150:]]
    assert sorted(found["train"] + found["test"]) == pairs(ROWS[:150])


def test_paragraphs_of_a_plain_file_are_texts(tmp_path):
    texts = sorted(f"line {i}\nof text" for i in range(50))
    (tmp_path / "a.txt").write_text("\n\n\n".join(texts) + "\n", encoding="utf-8-sig")
    assert column(checked(str(tmp_path / "a.txt"), form="text"), "text") == texts


LABELLED = b"text,label\nx,a\ny,a\n"
# Each has the name of the file, what is in it, and what the error says: mostly in the words of the library that reads.
BAD = {
    "not UTF-8": ("a.csv", LABELLED + b"caf\xe9,a\n", "can't decode byte 0xe9.*save it as UTF-8"),
    "broken JSON": ("a.jsonl", b'\n{"text": "x", "label": "a"}\n{"text": ', "JSON parse error.* in row 1"),
    "half a letter": ("a.jsonl", b'{"text": "\\ud800", "label": "a"}\n', "JSON parse error.* in row 0"),
    "no object": ("a.jsonl", b'{"text": "x", "label": "a"}\n[1, 2]\n', "JSON parse error"),
    "nested too deeply": ("a.json", b"[" * 200_000, "depth limit"),
    "one name twice": ("a.csv", b"text,text,label\nx,y,a\n", "has two columns 'text'"),
    "a cell too many": (
        "a.csv",
        LABELLED + b"x,y,a\n",
        "Expected 2 fields in line 4, saw 3; write texts that",
    ),
    "one too many in each row": ("a.csv", b"text,label\nx,y,a\n", "row 2 has more cells than the heading: a text that"),
    "an open quote": ("a.csv", LABELLED + b'a,"so it begins\nx,a\n', "EOF inside string starting at row 3"),
    "no list": ("a.json", b'{"columns": ["text"], "data": [["x"]]}', "no list of rows"),
    "bad array": ("a.json", b'[{"text": "x", "label": "a"},\n\n{"text": ]', "position 39"),
    "0 rows": ("a.csv", b"text,label\n", "corresponds to no data"),
    "an empty file": ("a.csv", b"", "No columns to parse from file"),
    "a cell too few": ("a.tsv", b"text\tlabel\nx\ta\ny\n", "row 3 has no label"),
    "no parquet": ("a.parquet", b"x", "cannot be read: Parquet"),
    "no kind": ("a.doc", b"x", r"must be a file \(.csv, .*, or ORG/NAME on the hub, got "),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_one_message_with_file_row_and_key(case, tmp_path, caplog):
    name, content, said = BAD[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=f"^data.train.*({said})") as caught:
        checked(str(tmp_path / name))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
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
        f"data.train={file}:",
        f"  rows {unlabelled} and 11 more: each has no label",
        "  row 93 has an empty text",
        "correct these 32, or set data.skip_unusable=true",
    ]


def test_rows_of_which_all_are_unusable_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="rows 2, 3: each has no label"):
        read(write(tmp_path / "b.csv", [{"text": "x", "label": ""}] * 2), skip_unusable=True)


def test_quotes_in_a_tsv_file_swallow_no_rows(tmp_path):
    kinds = ['"so begins {}', 'ends {} "', 'in "the" midst {}', '"']
    texts = {kind.format(i): kind.format(i) for i in range(20) for kind in kinds}
    texts |= {f'"all of ""it"" {i}"': f'all of "it" {i}' for i in range(20)}
    (tmp_path / "a.tsv").write_text('"text"\tlabel\n' + "".join(f"{text}\ta\n" for text in texts))
    assert column(checked(str(tmp_path / "a.tsv")), "text") == sorted(texts.values())


def test_cells_are_texts_as_they_stand_there(tmp_path):
    labels = ["01", "1", "007", "NA", "null"]
    texts = ["None", "NA", "null", "1e5", "2024-01-01"]
    rows = [{"text": f"{text} {i}".removesuffix(" 0"), "label": label}
            for i, label in enumerate(labels * 5) for text in texts]  # fmt: skip
    assert all_of(read(write(tmp_path / "a.csv", rows))) == pairs(rows)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "is not set; set data.train to your rows: a file"),
        ("none.csv", "none.csv does not exist; set data.train to"),
        ("a" * 999, "File name too long"),
    ],
)
def test_a_file_that_is_not_there_is_named(name, said):
    with pytest.raises(ConfigurationError, match=f"^data.train.*{said}"):
        read(name)


def test_the_kinds_of_files_that_are_named_before_datasets_is_loaded_are_those_that_are_read():
    assert tuple(source.READERS) == headings.KINDS
