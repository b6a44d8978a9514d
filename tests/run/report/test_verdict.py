"""The page begins with what came out, compares with other runs, warns, and ends with commands that run."""

import csv
import json
import shlex
from types import SimpleNamespace

import pytest
from tables import rows

import dynrank
from dynrank.commands import cli
from dynrank.errors import ConfigurationError
from dynrank.run.report.page import write_report
from dynrank.run.report.record import read_run
from dynrank.run.report.verdict import around, next_commands


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
        ({9: 1.0, 19: 3.0}, {}, "1 before, 3 10 steps later"),
        ({7: 1.0, 10: 3.0}, {}, "1 2 steps before, 3 1 step later"),
        ({9: 1.0, (10, "check"): 2.0, 19: 3.0}, CHECKED, "1 before, 2 right after it (+100.0%)"),
        ({9: 1.0, (10, "before"): 1.5, (10, "after"): 2.0, 19: 3.0}, CHECKED, "1.5 before, 2 right after it (+33.3%)"),
        ({19: 3.0}, {}, "– before, 3 10 steps later"),
        ({}, {}, "– before, – later"),
    ],
)
def test_training_between_validations_is_not_credited_to_the_change(rows, settings, said):
    steps = [row[0] if isinstance(row, tuple) else row for row in rows]
    metrics = {"val/loss": (steps, list(rows.values()))} if rows else {}
    run = SimpleNamespace(metrics=metrics, settings=settings)
    found = around(run, SimpleNamespace(step=10), "val/loss")
    assert str(found) == said
    assert (found.cost is None) == ("%" not in said)


def test_first_lines_say_test_change_bytes_and_gap(run_folder, tmp_path, page_of):
    folder = run_folder(tmp_path / "run", drops=[(10, 4)])
    final = {"val/loss": 0.9, "train/loss": 0.2}
    edited(folder, final=final, gap=0.7, bytes={"adapter": 2_500_000, "gradients": 1, "optimizer": 1})
    losses = {int(row["step"]): float(row["val/loss"]) for row in rows(folder / "metrics.csv", "val/loss")}
    (before, after, end) = (losses[step] for step in (4, 10, 28))
    lines = page_of(write_report(folder)).texts("li")
    assert lines[0].startswith("test/loss 1.25, after 30 steps")
    assert f"{before:.4g} 5 steps before, {after:.4g} 1 step later, {end:.4g} at the end" in lines[1]
    # 4 of 5 layers went from 8 to 4
    assert "2.50 MB, 60% of what it began with" in lines[2]
    assert "gap is 0.7: validation loss 0.9, training loss 0.2" in lines[3]


def test_other_runs_stand_beside_it_and_their_differences_at_the_top(run_folder, tmp_path, page_of, launch):
    for name, loss in (("a", 1.25), ("b", 1.5), ("c", 1.0)):
        edited(run_folder(tmp_path / name), test={"test/loss": loss})
    code, _, said = launch(cli.main, "report", "a", "--against", "b", "c")
    assert code == 0, said
    report = page_of(tmp_path / "a" / "report.html")
    assert [line.partition("test/loss ")[2].split(",")[0] for line in report.texts("li")[-2:]] == ["-0.25", "+0.25"]
    assert report.table("Results of the runs")[1] == ["test/loss", "1.25", "1.5", "1"]
    assert launch(cli.main, "report", "a", "b")[0] == 2
    (tmp_path / "empty").mkdir()
    before = (tmp_path / "a" / "report.html").read_bytes()
    with pytest.raises(ConfigurationError, match=r"--against.*empty"):
        write_report(tmp_path / "a", against=[tmp_path / "empty"])
    assert (tmp_path / "a" / "report.html").read_bytes() == before


def test_layers_are_shown_closed_where_all_have_one_rank(run_folder, smoke_run, tmp_path, page_of):
    differ, alike = page_of(write_report(run_folder(tmp_path))), page_of(smoke_run[0] / "report.html")
    for page, is_open in ((differ, True), (alike, False)):
        assert ("open" in page.root.find(".//details").attrib) == is_open
        assert any(picture.get("alt").startswith("Rank of") for picture in page.root.iter("img")) == is_open


def test_page_says_why_the_two_losses_are_not_of_one_kind(smoke_run, page_of):
    page = page_of(smoke_run[0] / "report.html")
    assert any("label smoothing (0.1)" in text and "measured alike" in text for text in page.texts("p"))


def test_what_was_written_is_shown_first_and_last(run_folder, tmp_path, page_of):
    texts = [[step, "val", f"p{i}", f"w{i}", f"<{step}>\n{i}"] for step in (4, 8, 12) for i in range(6)]
    with (run_folder(tmp_path) / "generations.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["step", "split", "prompt", "wanted", "written"], *texts])
    _, *shown = page_of(write_report(tmp_path)).table("For some prompts")
    assert shown[:2] == [["p0", "w0", "4", "<4>\n0"], ["p0", "w0", "12", "<12>\n0"]]
    assert len(shown) == 8


def test_commands_at_the_end_compose(smoke_run):
    run = read_run(smoke_run[0])
    commands = [shlex.split(command) for _, command in next_commands(run)]
    trained = [arguments for name, *arguments in commands if name == "dynrank-train"]
    assert len(trained) >= 3
    for arguments in trained:
        config = dynrank.compose([a.replace("1,2,3", "1") for a in arguments if a != "--multirun"])
        # debug=smoke, which the run was given, makes 12 steps.
        assert config.trainer.max_steps == 12
    assert ["dynrank", "predict", str(smoke_run[0] / "adapter"), "a text"] in commands
