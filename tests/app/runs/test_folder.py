"""The folder of a run: what ckpt_path means there, who may use it, and its tables where a run goes on."""

from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger
from tables import rows

from dynrank.app.runs import folder as run_folder
from dynrank.app.runs.report.record import read_metrics
from dynrank.app.runs.trainer import log_again
from dynrank.errors import ConfigurationError


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_resumed_run_has_the_rows_before_its_checkpoint_and_reads_none_twice(tmp_path):
    metrics = tmp_path / "metrics.csv"
    before = ",0,1.0,\n,1,0.9,\n,1,,5.0\n3,1,,4.0\n,2,0.8,\n,3,0.7\n4"
    # Of a resume that was killed at its start.
    write(tmp_path / "metrics.before", f"epoch,step,train,val\n{before}")
    write(metrics, "epoch,step,train\n,0,1.0\n")
    logger = CSVLogger(tmp_path, name="", version="")
    log_again(tmp_path / "none.csv", 2, logger)
    log_again(metrics, 2, logger)
    assert len(rows(metrics)) == 4
    # The checkpoint ended an epoch, so the validation after it is repeated in the next one.
    for values, step in (({"val": 4.0, "epoch": 4}, 1), ({"train": 0.8, "new": 1.0}, 2)):
        logger.log_metrics(values, step)
        logger.save()
    found = read_metrics(metrics)
    assert (found["train"], found["val"]) == (([0, 1, 2], [1.0, 0.9, 0.8]), ([1], [4.0]))
    assert found["new"] == ([2], [1.0])
    assert [*tmp_path.iterdir()] == [metrics]


def refused(folder, message, *, resumed=False):
    with pytest.raises(ConfigurationError, match=message), run_folder.locked(folder, resumed=resumed):
        pass


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path):
    refused(Path("/proc/x"), "no run can be made in '/proc/x': .*hydra.run.dir")
    # A lock holds against the same process, too.
    with run_folder.locked(tmp_path, resumed=False):
        for resumed in (False, True):
            refused(tmp_path, "in use by another process", resumed=resumed)
    write(tmp_path / "mine.txt", "mine")
    refused(tmp_path, r"empty folder, .* holds mine\.txt; set hydra\.run")
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("made", [None, "metrics.csv", "checkpoints/last.ckpt"])
def test_a_run_that_is_refused_leaves_nothing_unless_it_has_trained(made, tmp_path):
    """As one that diverges before its first checkpoint."""
    folder = tmp_path / "run"

    def diverge():
        with run_folder.locked(folder, resumed=False):
            write(folder / (made or ".hydra/config.yaml"), "x")
            raise ConfigurationError("the loss is nan")

    with pytest.raises(ConfigurationError, match="nan"):
        diverge()
    assert folder.exists() == (made is not None)
