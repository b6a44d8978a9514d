"""The page says what a run ended with, what validations next to a change measured, and what other runs ended with."""

import csv
import json
from types import SimpleNamespace

import pytest

from dynrank.commands import cli
from dynrank.errors import ConfigurationError
from dynrank.runs.report.page import write_report
from dynrank.runs.report.record import RunRecord, read_run


def edited(folder, **changes):
    file = folder / "summary.json"
    summary = json.loads(file.read_text())
    file.write_text(json.dumps({**summary, **changes}))
    return folder


CHECKED = {"schedule.how": {"max_regression": 0.1}}


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        # The rows 9 and 19 are those after 10 and 20 steps.
        ({9: 1.0, 19: 3.0}, {}, "1 → 3 (10 steps after)"),
        ({7: 1.0, 10: 3.0}, {}, "1 (2 steps before) → 3 (1 step after)"),
        ({9: 1.0, (10, "check"): 2.0, 19: 3.0}, CHECKED, "1 → 2"),
        ({9: 1.0, (10, "before"): 1.5, (10, "after"): 2.0, 19: 3.0}, CHECKED, "1.5 → 2"),
        ({19: 3.0}, {}, "– → 3 (10 steps after)"),
        ({}, {}, "– → –"),
    ],
)
def test_training_between_validations_is_not_credited_to_the_change(rows, settings, said):
    steps = [row[0] if isinstance(row, tuple) else row for row in rows]
    run = SimpleNamespace(metrics={"val/loss": (steps, list(rows.values()))}, settings=settings)
    assert RunRecord.around(run, SimpleNamespace(step=10), "val/loss") == said


def test_page_begins_with_results_final_weights_and_adapter(run_folder, tmp_path, page_of):
    folder = run_folder(tmp_path / "run", drops=[(10, 4)])
    # Another step than the last validation in metrics.csv, as after the last cut of schedule=auto.
    edited(folder, final={"val/loss": 0.9, "train/loss": 0.2}, gap=0.7)
    facts = page_of(write_report(folder)).facts()
    assert {name: facts[name] for name in ("test/loss", "steps", "val/loss at the end", "train/loss at the end")} == {
        "test/loss": "1.25", "steps": "30", "val/loss at the end": "0.9", "train/loss at the end": "0.2"
    }  # fmt: skip
    assert facts["gap: val/loss - train/loss"] == "0.7"
    assert facts["rank"] == "8 → 4-8"
    # Five layers of 28 parameters for each rank; the head stays at 8.
    assert facts["adapter parameters"] == f"{5 * 8 * 28:,} → 1,234"


def test_parameters_at_the_start_count_every_expert(run_folder, tmp_path):
    run = read_run(run_folder(tmp_path / "run", drops=[(10, 4)]))
    name, layer = next(iter(run.layers.items()))
    run.layers[name] = type(layer)(**{**vars(layer), "experts": 3})
    # One layer of five has three experts.
    assert run.parameters_at_start == (4 + 3) * 8 * 28


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


def test_what_was_written_is_shown_first_and_last(run_folder, tmp_path, page_of):
    texts = [[step, "val", f"p{i}", f"w{i}", f"<{step}>\n{i}"] for step in (4, 8, 12) for i in range(6)]
    with (run_folder(tmp_path) / "generations.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["step", "split", "prompt", "wanted", "written"], *texts])
    _, *shown = page_of(write_report(tmp_path)).table("For some prompts")
    assert shown[:2] == [["p0", "w0", "4", "<4>\n0"], ["p0", "w0", "12", "<12>\n0"]]
    assert len(shown) == 8
