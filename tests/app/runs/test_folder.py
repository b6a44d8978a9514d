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
    # The run has ended between the first look at its folder and the lock.
    write(tmp_path / "summary.json", "{}")
    with pytest.raises(ConfigurationError, match="has ended"), run_folder.locked(tmp_path, resumed=True):
        pass


def test_a_new_run_takes_the_folder_of_one_without_a_checkpoint_and_of_no_other(tmp_path):
    for name in ("metrics.csv", "rank_history.csv", "checkpoints/last.ckpt.12.part", "mine.txt", ".hydra/config.yaml"):
        write(tmp_path / name, "x")
    with run_folder.locked(tmp_path, resumed=False):
        assert {path.name for path in tmp_path.iterdir()} == {"mine.txt", ".lock", ".hydra"}
    write(tmp_path / "checkpoints" / "last.ckpt", "x")
    with pytest.raises(ConfigurationError, match="holds a run already"), run_folder.locked(tmp_path, resumed=False):
        pass
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize("name", ["metrics.csv", "adapter/adapter_config.json", "report.html"])
def test_a_new_run_replaces_no_files_of_somebody_else(name, tmp_path):
    write(tmp_path / name, "mine")
    held = name.partition("/")[0]
    refused = pytest.raises(ConfigurationError, match=rf"holds {held}, which a run would replace; .*hydra\.run\.dir")
    with refused, run_folder.locked(tmp_path, resumed=False):
        pass
    assert (tmp_path / name).read_text() == "mine"


def test_a_refusal_keeps_the_checkpoint_that_was_written_before_it(tmp_path):
    """As of a disk that is full before metrics.csv is made."""

    def run():
        with run_folder.locked(tmp_path, resumed=False):
            write(tmp_path / "checkpoints" / "last.ckpt", "x")
            raise ConfigurationError("the disk is full")

    with pytest.raises(ConfigurationError, match="full"):
        run()
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()
