"""A folder that is not that of a finished run, or whose files are broken, is refused by name; nothing is written."""

import shutil

import pytest
from report_pages import write_run

import dynrank
from dynrank import plot
from dynrank.app.runs.report.page import write_report
from dynrank.app.runs.report.record import read_run
from dynrank.errors import ConfigurationError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("record") / "run")


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def test_ranks_follow_what_was_made_and_not_what_was_taken_back(tmp_path):
    run = read_run(write_run(tmp_path, drops=[(10, 4), (20, 6)], undone=[(10, 1), (12, 3)]))
    assert [change.undone for change in run.history] == [True, False, True, False]
    assert run.ranks()["layers.0.up"] == [8, 4, 6]
    assert run.ranks()["head"] == [8]
    assert run.last_step == 30


def test_a_run_in_python_is_one_line_and_its_pictures_are_the_reports(folder):
    run = dynrank.read_run(str(folder))
    assert repr(run) == f"<run {str(folder)!r}: 30 steps, rank 2-8, test/loss 1.25>"
    assert run.config["lora"]["rank"] == 8
    assert run.summary.test == {"test/loss": 1.25}
    assert [change.step for change in run.history] == [10, 20]
    assert [len(values) for values in run.metrics["val/loss"]] == [5, 5]
    write_report(folder)
    for name, figure in (
        ("loss", plot.loss(run)),
        ("ranks", plot.ranks(run)),
        ("spectra", plot.spectra(run, "at the end")),
    ):
        figure.savefig(folder / "again.png")
        assert (folder / "again.png").read_bytes() == (folder / "plots" / f"{name}.png").read_bytes()


@pytest.mark.parametrize(("rows", "steps"), [("30,1.25,,", 30), ("0,1.25,,", 0), ("30,1.25,,\n30,,2.0,", 31)])
def test_steps_are_those_before_the_test_also_if_none_was_trained_here(folder, rows, steps):
    (folder / "rank_history.csv").write_text("step\n")
    (folder / "metrics.csv").write_text(f"step,test/loss,train/loss,val/loss\n{rows}\n")
    assert read_run(folder).last_step == steps


def edit(name, old, new):
    def change(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return change


def without(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("summary.json"), "summary.json"),
        (without(".hydra/config.yaml"), "config.yaml"),
        (without("adapter/adapter_model.safetensors"), "adapter_model.safetensors"),
        (edit("summary.json", "{", "["), "summary.json"),
        (edit("summary.json", '"seconds": 12.0', '"seconds": "12"'), "(?s)seconds.*'12'.*summary.json"),
    ],
)
def test_missing_file_is_named_and_an_earlier_report_stays(folder, damage, message):
    (folder / "report.html").write_text("earlier")
    damage(folder)
    with pytest.raises(ConfigurationError, match=message):
        write_report(folder)
    assert (folder / "report.html").read_text() == "earlier"
    assert not list(folder.glob("*.part"))
