import csv
import json
import os

import datasets
import pytest

import dynrank
from dynrank.errors import ConfigurationError
from dynrank.runs.job import build
from dynrank.tasks.data.columns import form_of
from dynrank.tasks.data.splits import from_files

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


def test_rows_in_a_json_file_are_a_list_alone_or_in_an_object_or_lines(tmp_path):
    file = tmp_path / "a.json"
    pair = {"version": "1", "data": ROWS}
    for content in (json.dumps({"data": ROWS}), json.dumps(pair, indent=1), "\n".join(map(json.dumps, ROWS))):
        file.write_text(content)
        assert sorted(sum(read(str(file)).values(), [])) == pairs(ROWS)
    file.write_text(
        "\n\n".join(json.dumps({"messages": [{**TALKS[0], "content": str(i)}, TALKS[1]]}) for i in range(9))
    )
    parts = from_files(str(file), None, None, form="chat", columns={}, share=0.3, seed=0)
    assert sum(map(len, parts.values())) == 9
    file = tmp_path / "a.JSONL"
    file.write_text("\ufeff\n\n" + "\n\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    assert sorted(sum(read(str(file)).values(), [])) == pairs(ROWS)


def test_splits_without_classes_depend_on_seed_and_text_alone(tmp_path):
    def texts(file, seed=0):
        parts = from_files(file, None, None, form="text", columns={}, share=0.2, seed=seed)
        return {split: set(rows["text"]) for split, rows in parts.items()}

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


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_texts_of_several_columns_are_joined(kind, tmp_path, capsys):
    rows = [
        {"Subject": "" if i % 3 == 0 else f"about {i}", "Body": f"body\n{i}", "label": "ab"[i % 2]} for i in range(40)
    ]
    found = read(write(tmp_path / f"a.{kind}", rows), columns={"text": ["Subject", "Body"]})
    assert "text <- Subject + Body, label <- label" in capsys.readouterr().out
    joined = ["\n".join(part for part in (row["Subject"], row["Body"]) if part) for row in rows]
    assert sorted(text for part in found.values() for text, _ in part) == sorted(joined)
    with pytest.raises(ConfigurationError, match="label must be one column, got"):
        read(str(tmp_path / f"a.{kind}"), columns={"text": "Body", "label": ["Subject", "label"]})
    with pytest.raises(ConfigurationError, match=r"no column 'Topic'.*set data\.columns\.text"):
        read(str(tmp_path / f"a.{kind}"), columns={"text": ["Topic", "Body"]})


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
    assert capsys.readouterr().out.splitlines()[1].split() == ["columns", "text", "<-", "review,", "label", "<-", label]
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


def jsonl(*rows, count=30, **shape):
    """JSONL of good rows and then of these."""
    shape = json.dumps(shape or {"text": "text NUMBER", "label": "a"})
    good = [shape.replace("NUMBER", f"{i:02}") for i in range(count)]
    return "\n".join([*good, *(row if isinstance(row, str) else json.dumps(row) for row in rows)]).encode()


PROMPTED = {"prompt": "p NUMBER", "answer": "a"}
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
TALKS = CHAT["messages"]
CALLING = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
CALL = {"messages": [TALKS[0], CALLING]}
LABELLED = b"text,label\nx,a\ny,a\n"
# Each has a form, the name of the file, what is in it, and what the error says beside the file.
BAD = {
    "not UTF-8": ("classification", "a.csv", LABELLED + b"caf\xe9,a\n", "Row #4.*invalid UTF8.*save it as UTF-8"),
    "half a letter": ("classification", "a.jsonl", jsonl(r'{"text": "\ud800", "label": "a"}'), "row 31 is not UTF-8"),
    "broken JSON": ("classification", "a.jsonl", jsonl('{"text": ', count=16), "row 17 is not JSON"),
    "deep JSON": ("classification", "a.jsonl", jsonl("[" * 100_000), "row 31 is not JSON"),
    "UTF-16": ("classification", "a.csv", LABELLED.decode().encode("utf-16"), "save it as UTF-8"),
    "one name twice": ("classification", "a.csv", b"text,text,label\nx,y,a\n", "has two columns 'text'"),
    "no name": ("classification", "a.csv", b",note,label\n0,x,a\n", "no text .* or write a first line"),
    "turns as a prompt": ("completion", "a.jsonl", jsonl(prompt=TALKS, answer=TALKS), "set task=chat"),
    "no list": ("text", "a.json", b'{"columns": ["text"], "data": [["x"]]}', "no list of rows"),
    "bad array": ("classification", "a.json", b'[{"text": "x", "label": "a"},\n\n{"text": ]', "line 3 column 10"),
    "a row without a label": ("classification", "a.csv", b"text,label\n\nx,1\ny,1\nz,\n", "row 4 has no label"),
    "a null label": ("classification", "a.jsonl", b"\n" + jsonl({"text": "x", "label": None}), "row 32 has no label"),
    "an empty text": ("classification", "a.jsonl", jsonl({"text": " ", "label": "a"}), "row 31 has an empty text"),
    "an empty answer": ("completion", "a.jsonl", jsonl({"prompt": "x", "answer": ""}, **PROMPTED), "row 31 has an em"),
    "0 rows": ("classification", "a.csv", b"text,label\n", "has 0 rows"),
    "no column": ("completion", "a.jsonl", jsonl(), r"no prompt column .*\['text', 'label'\]; set data.columns.prompt"),
    "another task's": ("completion", "a.jsonl", jsonl(**CHAT), "set task=chat, which takes them"),
    "a cell too many": ("classification", "a.csv", LABELLED + b"c,d,a\n", "row 4 has 3 cells, and the heading 2"),
    "a cell too few": ("classification", "a.tsv", b"text\tlabel\nx\ta\ny\n", "row 3 has 1 cells.*each line is a row"),
    "the assistant first": ("chat", "a.jsonl", jsonl({"messages": TALKS[1:]}, **CHAT), "row 31 .*starts with the ass"),
    "nobody answers": ("chat", "a.jsonl", jsonl({"messages": TALKS[:1]}, **CHAT), "row 31 .*without a turn"),
    "tool calls": ("chat", "a.jsonl", jsonl(CALL, CALL, **CHAT), "rows 31, 32: each has tool calls.*correct these 2"),
    "a silent user": ("chat", "a.jsonl", jsonl({"messages": [{**TALKS[0], "content": ""}]}, **CHAT), "row 31 .*user"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_one_message_with_file_row_and_key(case, tmp_path, caplog):
    form, name, content, said = BAD[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=rf"data\.train=.*{name}.*({said})") as caught:
        from_files(str(tmp_path / name), None, None, form=form, columns={}, share=0.2, seed=0)
    assert "\n" not in str(caught.value)
    assert not caplog.records


def test_all_faults_of_a_file_are_listed_at_once_with_their_rows(tmp_path):
    rows = [{"text": f"x\n{i}", "label": "" if i % 3 == 0 else "a"} for i in range(90)]
    file = write(tmp_path / "a.csv", rows)
    with open(file, "a") as more:
        more.write("one cell\n,a\n")
    with pytest.raises(ConfigurationError) as caught:
        read(file)
    # The heading is row 1, and a row may take two lines.
    unlabelled = ", ".join(str(2 + i) for i in range(0, 60, 3))
    assert str(caught.value).splitlines() == [
        f"data.train={file}:",
        f"  rows {unlabelled} and 10 more: each has no label",
        "  row 92 has 1 cells, and the heading 2: a text that holds ',' belongs in quotes",
        "  row 93 has an empty text",
        "correct these 32, or set data.skip_unusable=true",
    ]


def test_unusable_rows_are_left_out_and_counted_on_request(tmp_path):
    file = write(tmp_path / "a.csv", [*ROWS, {"text": "x", "label": ""}, {"text": "", "label": "odd"}])
    with open(file, "a") as more:
        more.write("a,b,c\n")
    found = from_files(file, None, None, form="classification", columns={}, share=0.2, seed=0, skip_unusable=True)
    assert sorted(row for part in found.values() for row in zip(part["text"], part["label"], strict=True)) == pairs(
        ROWS
    )
    assert found.unusable == {"train": 3}
    with pytest.raises(ConfigurationError, match="rows 2, 3: each has no label"):
        read(write(tmp_path / "b.csv", [{"text": "x", "label": ""}] * 2), skip_unusable=True)


def test_quotes_in_a_tsv_file_swallow_no_rows(tmp_path):
    kinds = ['"so begins {}', 'ends {} "', 'in "the" midst {}', '"']
    texts = {kind.format(i): kind.format(i) for i in range(20) for kind in kinds}
    texts |= {f'"all of ""it"" {i}"': f'all of "it" {i}' for i in range(20)}
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "".join(f"{text}\ta\n" for text in texts))
    assert sorted(text for text, _ in sum(read(str(tmp_path / "a.tsv")).values(), [])) == sorted(texts.values())


def test_cells_are_texts_as_they_stand_there(tmp_path):
    labels = ["01", "1", "007", "NA", "null"]
    texts = ["None", "NA", "null", "1e5", "2024-01-01"]
    rows = [{"text": f"{text}" if i == 0 else f"{text} {i}", "label": label}
            for i, label in enumerate(labels * 5) for text in texts]  # fmt: skip
    assert sorted({pair for part in read(write(tmp_path / "a.csv", rows)).values() for pair in part}) == pairs(rows)
    dated = [{"prompt": f"when {i}", "answer": f"2024-01-{i:02}"} for i in range(1, 29)]
    parts = from_files(write(tmp_path / "a.jsonl", dated), None, None, form="completion", columns={}, share=0.2, seed=0)
    assert sorted(row["answer"] for part in parts.values() for row in part) == [row["answer"] for row in dated]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_file_that_has_changed_is_read_anew(kind, tmp_path):
    file = tmp_path / f"a.{kind}"
    for time, (old, new) in enumerate((("even", "even"), ("even", "eVen"))):
        write(file, [{**row, "label": row["label"].replace(old, new)} for row in ROWS])
        os.utime(file, (time, time))
        assert {label for _, label in sum(read(str(file)).values(), [])} == {new, "odd"}


def test_a_folder_with_a_script_of_its_own_name_is_a_folder(tmp_path):
    folder = tmp_path / "talk"
    folder.mkdir()
    (folder / "talk.py").write_text("raise AssertionError('it was run')")
    write(folder / "train.csv", ROWS)
    assert sorted(sum(read(str(folder)).values(), [])) == pairs(ROWS)
    with pytest.raises(ConfigurationError, match=r"data\.val=.*talk.*no files .*for validation"):
        read(str(folder), val=str(folder))


def of_form(form, rows, path):
    file = write(path, [row for i in range(30) for row in [json.loads(json.dumps(rows).replace("NUMBER", f"{i:02}"))]])
    parts = from_files(file, None, None, form=form, columns={}, share=0.2, seed=0)
    return [row for part in parts.values() for row in part if "07" in json.dumps(row)][0]


TURNS = [{"role": "user", "content": "q 07"}, {"role": "assistant", "content": "a"}]
SYSTEM = {"role": "system", "content": "s"}
# Each has a form, what others write, and what is read of it.
KNOWN = {
    "Alpaca": ("completion", {"instruction": "add NUMBER", "input": "1 2", "output": "3"},
               {"prompt": "add 07\n1 2", "answer": "3"}),
    "Alpaca without an input": ("completion", {"instruction": "add NUMBER", "input": "", "output": "3"},
                                {"prompt": "add 07", "answer": "3"}),
    "LLaMA-Factory": ("completion", {"prompt": "add NUMBER", "query": "1 2", "response": "3"},
                      {"prompt": "add 07\n1 2", "answer": "3"}),
    "ShareGPT": ("chat", {"conversations": [{"from": "human", "value": "q NUMBER"}, {"from": "gpt", "value": "a"}],
                          "system": "s"}, {"messages": [SYSTEM, *TURNS]}),
    "axolotl's context_qa": ("completion", {"context": "1 2", "question": "add NUMBER", "answer": "3"},
                             {"prompt": "add 07\n1 2", "answer": "3"}),
    "axolotl's metharme": ("completion", {"prompt": "add NUMBER", "generation": "3"},
                           {"prompt": "add 07", "answer": "3"}),
    "axolotl's open_orca": ("chat", {"system_prompt": "s", "question": "q NUMBER", "response": "a"},
                            {"messages": [SYSTEM, *TURNS]}),
    "TRL's chat": ("chat", {"prompt": [{"role": "user", "content": "q NUMBER"}],
                            "completion": [{"role": "assistant", "content": "a"}]}, {"messages": TURNS}),
    "Alpaca as a chat": ("chat", {"instruction": "q NUMBER", "output": "a", "system": "s"},
                         {"messages": [SYSTEM, *TURNS]}),
}  # fmt: skip


def test_turns_as_a_prompt_are_a_chat():
    row = {"prompt": TALKS[:1], "completion": TALKS[1:]}
    assert form_of([row], ("completion", "text"), {}, "") == "chat"
    assert form_of([{"prompt": "q", "completion": "a"}], ("completion", "text"), {}, "") == "completion"


@pytest.mark.parametrize("case", KNOWN)
def test_what_others_call_columns_is_read(case, tmp_path):
    form, row, expected = KNOWN[case]
    assert of_form(form, row, tmp_path / "a.jsonl") == expected


def test_a_column_that_is_known_and_not_used_is_said(tmp_path, capsys):
    row = {"instruction": "NUMBER", "output": "7", "system": "s", "history": [], "id": 3}
    of_form("completion", row, tmp_path / "a.jsonl")
    assert "not used         system, history\n" in capsys.readouterr().out
    turns = [{**turn, "weight": 1} for turn in TURNS]
    of_form("chat", {"messages": [{"role": "user", "content": "NUMBER"}, *turns[1:]]}, tmp_path / "b.jsonl")
    assert "not used         messages.weight\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "column", "said"),
    [
        ("text", "body", r"a\.csv has no column 'body'; it has .*; set data\.columns\.text to one of these"),
        ("text_pair", "text", "columns.text_pair names no column that is read; those are .*label"),
    ],
)
def test_columns_that_are_not_there_or_that_nothing_reads_are_named(key, column, said, tmp_path):
    with pytest.raises(ConfigurationError, match=said):
        read(write(tmp_path / "a.csv", ROWS), columns={key: column})


UNREADABLE = {
    "": "is not set; set data.train to your rows: a file",
    "none.csv": "none.csv does not exist; set data.train to a file",
    "rows.doc": r"must be a file \(.csv, .*, or ORG/NAME on the hub, got 'rows.doc'",
    "broken.json": "broken.json cannot be read: Expecting value",
    "broken.parquet": "broken.parquet cannot be read: Parquet magic bytes",
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_file_that_cannot_be_read_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("rows.doc", "broken.json", "broken.parquet"):
        (tmp_path / file).write_text("broken: no file of its kind")
    with pytest.raises(ConfigurationError, match=rf"^data\.train.*{UNREADABLE[name]}"):
        read(name)


def test_task_classification_takes_a_file(tiny_bert, tmp_path):
    file = write(tmp_path / "rows.csv", [{"text": row["text"], "class": row["label"]} for row in ROWS])
    options = ["task=classification", f"data.train={file}", "data.columns.label=class", f"task.model={tiny_bert}"]
    task = build(dynrank.compose([*options, "debug=smoke", "plots=false"]), on_meta=True).task
    task.setup("fit")
    assert task.labels == ["even", "odd"]
    assert len(task.examples["train"]) == 64
    no_file = dynrank.compose(["task=classification", f"task.model={tiny_bert}", "plots=false"])
    with pytest.raises(ConfigurationError, match=r"^data\.train is not set; set data\.train to your rows: a file"):
        build(no_file)
