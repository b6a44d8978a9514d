"""report.html holds what the run's files say, alone or beside other runs, as a whole page that needs nothing else."""

import base64
import io
import json
import re

import pytest
from PIL import Image
from report_pages import NASTY, Page, write_run

from dynrank.app.commands import cli
from dynrank.app.runs.report import page as report_page
from dynrank.app.runs.report.page import write_report
from dynrank.app.runs.report.record import read_run
from dynrank.errors import ConfigurationError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("report") / "run", undone=[(15, 1)])


@pytest.fixture(scope="module")
def report(folder):
    return Page(write_report(folder))


@pytest.fixture
def no_matplotlib(monkeypatch):
    monkeypatch.setattr(report_page, "find_spec", lambda name: None)


def test_every_layer_has_a_row_with_its_ranks(report, folder):
    headings, *rows = report.table("The adapter's layers")
    assert headings[:4] == ["layer", "d_out × d_in", "rank", "importance"]
    # A layer that never changed has no row in the history.
    importance = {row[0].split(".")[-1]: row[3] for row in rows}
    assert importance == {"up": "0.2 ± 0.05", NASTY: "–", "head": "–"}
    ranks = {row[0]: row[2] for row in rows}
    assert list(ranks) == list(json.loads((folder / "summary.json").read_text())["final_ranks"])
    assert ranks[f"layers.1.{NASTY}"] == "8 → 4 → 2"
    assert ranks["head"] == "8"
    assert {row[1] for row in rows} == {"16 × 12"}
    assert {row[0]: int(row[-1]) for row in rows} == {n: (8 if n == "head" else 2) * 28 for n in ranks}


def test_changes_stand_in_order_and_one_taken_back_says_so(report):
    rows = report.table("Each change")[1:]
    assert [row[:3] for row in rows] == [["10", "8 → 4", "4"], ["15", "4 → 1", "4"], ["20", "4 → 2", "4"]]
    assert [row[-1].startswith("undone") for row in rows] == [False, True, False]
    assert len(report.root.findall(".//tr[@class='undone']")) == 1


@pytest.mark.usefixtures("no_matplotlib")
def test_page_begins_with_results_and_data(tmp_path):
    weights = "of step 20 of 30: the best val/loss"
    split = {"rows": 1234, "examples": 1200, "tokens": 9, "max_length": 8, "unusable": 31, "dropped": 3}
    # Another step than the last validation in metrics.csv, as after the last cut of schedule=auto.
    more = {"final": {"val/loss": 0.9, "train/loss": 0.2}, "gap": 0.7, "data": {"train": split}}
    report = Page(write_report(write_run(tmp_path, drops=[(10, 4)], weights=weights, **more)))
    facts = {"test/loss": "1.25", "steps": "30", "val/loss at the end": "0.9", "train/loss at the end": "0.2"}
    facts |= {"gap: val/loss - train/loss": "0.7", "rank": "4-8", "adapter parameters": "1,234", "weights": weights}
    assert facts.items() <= dict(report.table("Results")).items()
    counts = {"split": "train", "rows": "1,234", "unusable, left out": "31", "in another split, left out": "3"}
    counts |= {"too long, left out": "0", "too long, cut": "0", "examples": "1,200", "tokens": "9"}
    headings, row = report.table("The data")
    assert dict(zip(headings, row, strict=True)) == counts


def test_configuration_and_what_was_given_are_there_word_for_word(report, folder):
    assert report.texts("pre") == [(folder / ".hydra" / "config.yaml").read_text()]
    assert report.texts("code") == ["lora.rank=8", f"note={NASTY!r}"]
    assert not list(report.root.iter("b"))


def test_page_needs_nothing_else_and_can_be_heard(report, folder):
    assert not {element.tag for element in report.root.iter()} & {"script", "link", "iframe", "object"}
    assert not re.search(r"https?:|@import|url\(", (folder / "report.html").read_text())
    for image, name in zip(report.root.iter("img"), ["loss", "ranks", "spectra"], strict=True):
        content = base64.b64decode(image.get("src").removeprefix("data:image/png;base64,"))
        assert content == (folder / "plots" / f"{name}.png").read_bytes()
        assert Image.open(io.BytesIO(content)).width > 900
    assert [caption.split()[0] for caption in report.captions()] == ["Training", "Ranks", "Singular"]
    assert {heading.get("scope") for heading in report.root.iter("th")} == {"col", "row"}
    assert report.root.attrib == {"lang": "en"}


@pytest.mark.usefixtures("no_matplotlib")
def test_a_run_without_changes_and_a_page_without_matplotlib_say_so(tmp_path):
    report = Page(write_report(write_run(tmp_path, drops=())))
    assert not report.captions()
    paragraphs = report.texts("p")
    assert "No rank changed in this run." in paragraphs
    assert any("dynrank[plots]" in text for text in paragraphs)
    assert {row[2] for row in report.table("The adapter's layers")[1:]} == {"8"}


@pytest.mark.usefixtures("no_matplotlib")
def test_other_runs_stand_beside_it(tmp_path, launch):
    for name, test in (("a", {}), ("b/run", {"test/loss": 1.5}), ("b/b/run", {"test/loss": 1.0, "test/bleu": 0.5})):
        write_run(tmp_path / name, test={"test/loss": 1.25} | test)
    code, printed, said = launch(cli.main, "report", "a", "--against", "b/run", "b/b/run")
    assert (code, printed.split()) == (0, ["report", "a/report.html"]), said
    headings, *found = Page(tmp_path / "a" / "report.html").table("Results")
    # Two of them have one name on the page.
    assert headings == ["", f"{tmp_path.name}/a", "b/run", "b/run"]
    compared = {row[0]: row[1:] for row in found}
    assert compared["test/loss"] == ["1.25", "1.5", "1"]
    assert compared["test/bleu"] == ["–", "–", "0.5"]
    assert launch(cli.main, "report", "a", "b")[0] == 2
    (tmp_path / "empty").mkdir()
    before = (tmp_path / "a" / "report.html").read_bytes()
    with pytest.raises(ConfigurationError, match="empty.*finished run"):
        write_report(tmp_path / "a", against=[tmp_path / "empty"])
    assert (tmp_path / "a" / "report.html").read_bytes() == before


def test_report_of_a_real_run_knows_its_drop_and_what_validations_measured(smoke_run):
    assert read_run(smoke_run[0]).summary.steps == 12
    report = Page(smoke_run[0] / "report.html")
    assert {row[2] for row in report.table("The adapter's layers")[1:]} == {"32 → 16"}
    assert any("val/accuracy, val/macro_f1" in caption for caption in report.captions())
