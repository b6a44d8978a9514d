"""report.html holds what the run's files say, as a whole page that needs nothing else."""

import base64
import io
import json
import re

import pytest
from PIL import Image

from dynrank.runs.report import page as report_page
from dynrank.runs.report.page import write_report
from dynrank.runs.report.record import read_run


@pytest.fixture(scope="module")
def folder(run_folder, tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("report") / "run", undone=[(15, 1)])


@pytest.fixture(scope="module")
def report(folder, page_of):
    return page_of(write_report(folder))


def captions(report):
    return [picture.get("alt") for picture in report.root.iter("img")]


def test_every_layer_has_a_row_with_its_ranks(report, folder, nasty):
    headings, *rows = report.table("The adapter's layers")
    assert headings[:4] == ["layer", "d_out × d_in", "rank", "brought"]
    # A layer that never changed has no row in the history.
    brought = {row[0].split(".")[-1]: row[3] for row in rows}
    assert brought == {"up": "0.2 ± 0.05", nasty.split(".")[-1]: "–", "head": "–"}
    ranks = {row[0]: row[2] for row in rows}
    assert list(ranks) == list(json.loads((folder / "summary.json").read_text())["final_ranks"])
    assert ranks[f"layers.1.{nasty}"] == "8 → 4 → 2"
    assert ranks["head"] == "8"
    assert {row[1] for row in rows} == {"16 × 12"}
    assert {row[0]: int(row[-1]) for row in rows} == {n: (8 if n == "head" else 2) * 28 for n in ranks}


def test_changes_stand_in_order_and_one_taken_back_says_so(report):
    rows = report.table("Each change")[1:]
    assert [row[:3] for row in rows] == [["10", "8 → 4", "4"], ["15", "4 → 1", "4"], ["20", "4 → 2", "4"]]
    assert [row[-1].startswith("undone") for row in rows] == [False, True, False]
    assert len(report.root.findall(".//tr[@class='undone']")) == 1


def test_weights_cost_and_the_rows_that_were_left_out_are_said(run_folder, tmp_path, page_of):
    folder = run_folder(tmp_path / "run")
    file = folder / "summary.json"
    said = {"weights": "of step 20 of 30: the best val/loss", "cost": "val/loss 1 → 2 by the cut at step 10, 1.5 now"}
    split = {"rows": 1234, "examples": 1200, "tokens": 9, "max_length": 8, "unusable": 31, "dropped": 3}
    file.write_text(json.dumps(json.loads(file.read_text()) | said | {"data": {"train": split}}))
    report = page_of(write_report(folder))
    paragraphs = " ".join(report.texts("p"))
    assert all(words in paragraphs for words in said.values())
    headings, row = report.table("The data")
    assert dict(zip(headings, row, strict=True)) == {
        "split": "train",
        "rows": "1,234",
        "unusable, left out": "31",
        "in another split, left out": "3",
        "too long, left out": "0",
        "too long, cut": "0",
        "examples": "1,200",
        "tokens": "9",
    }


def test_caption_of_the_ranks_says_why_they_differ(run_folder, tmp_path, page_of):
    folder = run_folder(tmp_path / "run")
    history = folder / "rank_history.csv"
    for last, said in ((2, False), (3, True)):
        history.write_text(history.read_text().replace("20,layers.0.up,4,2", f"20,layers.0.up,4,{last}"))
        (caption,) = [text for text in captions(page_of(write_report(folder))) if text.startswith("Ranks of")]
        assert ("in proportion to what it has brought" in caption) is said


def test_configuration_and_what_was_given_are_there_word_for_word(report, folder, nasty):
    assert report.texts("pre") == [(folder / ".hydra" / "config.yaml").read_text()]
    assert report.texts("code")[:2] == ["lora.rank=8", f"note={nasty!r}"]
    assert not list(report.root.iter("b"))


def test_page_needs_nothing_else_and_can_be_heard(report, folder):
    assert not {element.tag for element in report.root.iter()} & {"script", "link", "iframe", "object"}
    assert not re.search(r"https?:|@import|url\(", (folder / "report.html").read_text())
    for image, name in zip(report.root.iter("img"), ["loss", "ranks", "spectra"], strict=True):
        content = base64.b64decode(image.get("src").removeprefix("data:image/png;base64,"))
        assert content == (folder / "plots" / f"{name}.png").read_bytes()
        assert Image.open(io.BytesIO(content)).width > 900
    assert [caption.split()[0] for caption in captions(report)] == ["Training", "Ranks", "Singular"]
    assert {heading.get("scope") for heading in report.root.iter("th")} == {"col", "row"}
    assert all(len({len(row) for row in rows}) == 1 for rows in report.tables().values())
    assert report.root.attrib == {"lang": "en"}


def test_page_without_matplotlib_has_the_tables_and_says_what_to_install(run_folder, tmp_path, page_of, monkeypatch):
    monkeypatch.setattr(report_page, "find_spec", lambda name: None)
    report = page_of(write_report(run_folder(tmp_path)))
    assert not captions(report)
    assert any("dynrank[plots]" in text for text in report.texts("p"))
    assert len(report.table("The adapter's layers")) == 6


def test_run_that_changed_no_rank_says_so(run_folder, tmp_path, page_of):
    report = page_of(write_report(run_folder(tmp_path, drops=())))
    assert "No rank changed in this run." in report.texts("p")
    assert {row[2] for row in report.table("The adapter's layers")[1:]} == {"8"}
    assert report.facts()["rank"] == "8"


def test_two_hundred_layers_and_many_steps_stay_below_two_megabytes(run_folder, tmp_path, page_of):
    drops = [(700 * i, 12 - i) for i in range(1, 11)]
    run_folder(tmp_path, blocks=67, kinds=("a", "b", "c"), drops=drops, steps=10_000, rank=12)
    file = write_report(tmp_path)
    assert file.stat().st_size < 2e6
    report = page_of(file)
    assert len(report.table("The adapter's layers")) == 203
    assert report.table("The adapter's layers")[1][2] == "12 → … → 2"


def test_report_of_a_real_run_knows_its_drop_and_what_validations_measured(smoke_run, page_of):
    assert read_run(smoke_run[0]).last_step == 12
    report = page_of(smoke_run[0] / "report.html")
    assert {row[2] for row in report.table("The adapter's layers")[1:]} == {"32 → 16"}
    assert any("val/accuracy, val/macro_f1" in caption for caption in captions(report))
