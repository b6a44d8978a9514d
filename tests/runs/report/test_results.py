"""The page says what a run ended with, and what other runs ended with."""

import json

import pytest

from dynrank.commands import cli
from dynrank.errors import ConfigurationError
from dynrank.runs.report.page import write_report


def edited(folder, **changes):
    file = folder / "summary.json"
    summary = json.loads(file.read_text())
    file.write_text(json.dumps({**summary, **changes}))
    return folder


def test_page_begins_with_results_final_weights_and_adapter(run_folder, tmp_path, page_of):
    folder = run_folder(tmp_path / "run", drops=[(10, 4)])
    # Another step than the last validation in metrics.csv, as after the last cut of schedule=auto.
    edited(folder, final={"val/loss": 0.9, "train/loss": 0.2}, gap=0.7)
    facts = page_of(write_report(folder)).facts()
    assert {name: facts[name] for name in ("test/loss", "steps", "val/loss at the end", "train/loss at the end")} == {
        "test/loss": "1.25", "steps": "30", "val/loss at the end": "0.9", "train/loss at the end": "0.2"
    }  # fmt: skip
    assert facts["gap: val/loss - train/loss"] == "0.7"
    assert facts["rank"] == "4-8"
    assert facts["adapter parameters"] == "1,234"


def test_other_runs_stand_beside_it_and_every_section_stays(run_folder, tmp_path, page_of, launch):
    for name, loss in (("a", 1.25), ("b", 1.5), ("c", 1.0)):
        edited(run_folder(tmp_path / name), test={"test/loss": loss})
    edited(tmp_path / "c", test={"test/loss": 1.0, "test/bleu": 0.5})
    alone = page_of(write_report(tmp_path / "a"))
    code, _, said = launch(cli.main, "report", "a", "--against", "b", "c")
    assert code == 0, said
    report = page_of(tmp_path / "a" / "report.html")
    compared = {row[0]: row[1:] for row in report.table("Results of the runs")[1:]}
    assert compared["test/loss"] == ["1.25", "1.5", "1"]
    assert compared["test/bleu"] == ["–", "–", "0.5"]
    assert compared["rank"] == ["2-8"] * 3
    assert report.texts("h2") == ["Against other runs", *alone.texts("h2")]
    assert alone.texts("h2") == ["Changes of rank", "Pictures", "Layers", "Configuration", "What to try next"]
    assert launch(cli.main, "report", "a", "b")[0] == 2
    (tmp_path / "empty").mkdir()
    before = (tmp_path / "a" / "report.html").read_bytes()
    with pytest.raises(ConfigurationError, match=r"--against.*empty"):
        write_report(tmp_path / "a", against=[tmp_path / "empty"])
    assert (tmp_path / "a" / "report.html").read_bytes() == before
