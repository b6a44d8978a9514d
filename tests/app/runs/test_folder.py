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
    write(metrics, "epoch,step,train,val\n,0,1.0,\n,1,0.9,\n,1,,5.0\n3,1,,4.0\n,2,0.8,\n,3,0.7\n4")
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


def test_a_folder_that_cannot_be_written_to_is_one_line():
    refused = pytest.raises(ConfigurationError, match="no run can be made in '/proc': .*hydra.run.dir")
    with refused, run_folder.locked(Path("/proc"), resumed=False):
        pass


def test_a_folder_is_used_by_one_process_at_a_time(tmp_path):
    # A lock holds against the same process, too.
    with run_folder.locked(tmp_path, resumed=False):
        for resumed in (False, True):
            with (
                pytest.raises(ConfigurationError, match="in use by another process"),
                run_folder.locked(tmp_path, resumed=resumed),
            ):
                pass
    write(tmp_path / "checkpoints" / "last.ckpt", "x")
    write(tmp_path / "checkpoints" / "last.ckpt.12.part", "left by a killed writer")
    with run_folder.locked(tmp_path, resumed=True):
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("name", ["checkpoints/last.ckpt", "metrics.csv", "mine.txt"])
def test_a_new_run_replaces_no_files(name, tmp_path):
    write(tmp_path / name, "mine")
    refused = pytest.raises(
        ConfigurationError, match=rf"empty folder, .* holds {name.partition('/')[0]}; set hydra\.run"
    )
    with refused, run_folder.locked(tmp_path, resumed=False):
        pass
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("made", [None, "metrics.csv", "checkpoints/last.ckpt"])
def test_a_run_that_is_refused_leaves_nothing_unless_it_has_trained(made, tmp_path):
    """As one that diverges before its first checkpoint."""

    def refused():
        with run_folder.locked(tmp_path / "run", resumed=False):
            write(tmp_path / "run" / ".hydra" / "config.yaml", "x")
            if made is not None:
                write(tmp_path / "run" / made, "x")
            raise ConfigurationError("the loss is nan")

    with pytest.raises(ConfigurationError, match="nan"):
        refused()
    assert (tmp_path / "run").exists() == (made is not None)
    assert made is None or (tmp_path / "run" / made).read_text() == "x"


def test_a_run_that_another_process_has_ended_meanwhile_is_not_resumed(tmp_path):
    write(tmp_path / "checkpoints" / "last.ckpt", "x")
    write(tmp_path / "summary.json", "{}")
    with pytest.raises(ConfigurationError, match="has ended"), run_folder.locked(tmp_path, resumed=True):
        pass
