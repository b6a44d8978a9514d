"""The record of a finished run; a folder of another kind, or with a broken file, is refused by name."""

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
    assert [(change.undone, change.ranks) for change in run.history] == [
        (True, "8 → 1"),
        (False, "8 → 4"),
        (True, "4 → 3"),
        (False, "4 → 6"),
    ]
    assert run.ranks()["layers.0.up"] == [8, 4, 6]
    assert run.ranks()["head"] == [8]


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


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("summary.json", None, "finished run.*summary.json"),
        ("summary.json", ("{", "["), "finished run.*summary.json"),
        ("summary.json", ('"seconds": 12.0', '"seconds": "12"'), "(?s)seconds.*'12'.*summary.json"),
        ("adapter/adapter_model.safetensors", None, "adapter_model.safetensors"),
    ],
)
def test_missing_or_broken_file_is_named_and_an_earlier_report_stays(folder, name, damage, message):
    (folder / "report.html").write_text("earlier")
    if damage is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text((folder / name).read_text().replace(*damage, 1))
    with pytest.raises(ConfigurationError, match=message):
        write_report(folder)
    assert (folder / "report.html").read_text() == "earlier"
    assert not list(folder.glob("*.part"))
