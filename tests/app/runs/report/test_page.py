"""report.html, and the record in Python, hold what the run's files say; the page is whole and needs nothing else."""

import base64
import io
import json
import re

import pytest
from PIL import Image
from report_pages import NASTY, Page, write_run

import dynrank
from dynrank import plot
from dynrank.app.commands import cli
from dynrank.app.runs.report import page as report_page
from dynrank.app.runs.report.page import write_report
from dynrank.app.runs.report.record import read_run
from dynrank.errors import ConfigurationError

SPLIT = {"rows": 1234, "examples": 1200, "tokens": 9, "at_max_length": 0, "unusable": 31}
# Another step than the last validation in metrics.csv, as after the last cut of schedule=auto.
MORE = {"final": {"val/loss": 0.9, "train/loss": 0.2}, "gap": 0.7, "weights": "of step 20", "data": {"train": SPLIT}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("report") / "run", undone=[(15, 1)], **MORE)


@pytest.fixture(scope="module")
def report(folder):
    return Page(write_report(folder))


def test_page_begins_with_results_and_data(report):
    facts = {"test/loss": "1.25", "steps": "30", "val/loss at the end": "0.9", "train/loss at the end": "0.2"}
    facts |= {
        "gap: val/loss - train/loss": "0.7",
        "rank": "2-8",
        "adapter parameters": "1,234",
        "weights": "of step 20",
    }
    assert facts.items() <= dict(report.table("Results")).items()
    counts = {"split": "train", "rows": "1,234", "examples": "1,200", "tokens": "9", "at max length": "0"}
    counts["unusable"] = "31"
    headings, row = report.table("The data")
    assert dict(zip(headings, row, strict=True)) == counts


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
        assert image.get("alt")
    assert {heading.get("scope") for heading in report.root.iter("th")} == {"col", "row"}
    assert report.root.attrib == {"lang": "en"}


def test_other_runs_stand_beside_one_without_changes_and_pictures(tmp_path, launch, monkeypatch):
    monkeypatch.setattr(report_page, "find_spec", lambda name: None)
    for name, test in (("a", {}), ("b/run", {"test/loss": 1.5}), ("b/b/run", {"test/loss": 1.0, "test/bleu": 0.5})):
        write_run(tmp_path / name, drops=(), test={"test/loss": 1.25} | test)
    code, printed, said = launch(cli.main, "report", "a", "--against", "b/run", "b/b/run")
    assert (code, printed.split()) == (0, ["report", "a/report.html"]), said
    report = Page(tmp_path / "a" / "report.html")
    headings, *rows = report.table("Results")
    # Two of them have one name on the page.
    assert headings == ["", f"{tmp_path.name}/a", "b/run", "b/run"]
    compared = {row[0]: row[1:] for row in rows}
    assert (compared["test/loss"], compared["test/bleu"]) == (["1.25", "1.5", "1"], ["–", "–", "0.5"])
    changes, pictures, *_ = report.texts("p")
    assert (changes, "dynrank[plots]" in pictures) == ("No rank changed in this run.", True)
    assert {row[2] for row in report.table("The adapter's layers")[1:]} == {"8"}
    assert launch(cli.main, "report", "a", "b")[0] == 2
    with pytest.raises(ConfigurationError, match="b' must be the folder of a finished run"):
        write_report(tmp_path / "a", against=[tmp_path / "b"])


def test_report_of_a_real_run_knows_its_drop_and_what_validations_measured(smoke_run):
    assert read_run(smoke_run[0]).summary.steps == 12
    report = Page(smoke_run[0] / "report.html")
    assert {row[2] for row in report.table("The adapter's layers")[1:]} == {"32 → 16"}
    assert any("val/accuracy, val/macro_f1" in picture.get("alt") for picture in report.root.iter("img"))


def test_a_run_in_python_is_one_line_and_its_pictures_are_the_reports(folder, report, tmp_path):
    run = dynrank.read_run(str(folder))
    assert repr(run) == f"<run {str(folder)!r}: 30 steps, rank 2-8, test/loss 1.25>"
    assert run.config["lora"]["rank"] == 8
    assert run.summary.test == {"test/loss": 1.25}
    assert [(change.step, change.undone) for change in run.history] == [(10, False), (15, True), (20, False)]
    assert [len(values) for values in run.metrics["val/loss"]] == [5, 5]
    for name, figure in {"loss": plot.loss(run), "ranks": plot.ranks(run)}.items():
        figure.savefig(tmp_path / "again.png")
        assert (tmp_path / "again.png").read_bytes() == (folder / "plots" / f"{name}.png").read_bytes()


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("summary.json", None, "finished run.*summary.json"),
        ("summary.json", ("{", "["), "finished run.*summary.json"),
        ("summary.json", ('"seconds": 12.0', '"seconds": "12"'), "(?s)seconds.*'12'.*summary.json"),
        ("adapter/adapter_model.safetensors", None, "adapter_model.safetensors"),
    ],
)
def test_missing_or_broken_file_is_named_and_an_earlier_report_stays(tmp_path, name, damage, message):
    folder = write_run(tmp_path / "run")
    (folder / "report.html").write_text("earlier")
    if damage is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text((folder / name).read_text().replace(*damage, 1))
    with pytest.raises(ConfigurationError, match=message):
        write_report(folder)
    assert (folder / "report.html").read_text() == "earlier"
    assert not list(folder.glob("*.part"))
