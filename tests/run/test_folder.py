"""The folder of a run: what ckpt_path means there, who may use it, and its tables where a run goes on."""

import os
from pathlib import Path

import pytest
from tables import rows

from dynrank.errors import ConfigurationError
from dynrank.run import folder as run_folder


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_tables_are_joined_at_the_step_that_a_run_goes_on_from(tmp_path):
    write(tmp_path / "metrics.csv", "step,train,val\n0,1.0,\n1,0.9,\n1,,5.0\n2,0.8,\n3,0.7\n4,")
    write(tmp_path / "generations.csv", 'step,split,written\n2,val,"a\n5"\n3,val,b\n')
    run_folder.take_up(tmp_path, 2)
    assert [row["written"] for row in rows(tmp_path / "generations.csv")] == ["a\n5"]
    (tmp_path / "generations.csv").unlink()
    assert not (tmp_path / "metrics.csv").exists()
    write(tmp_path / "metrics.csv", "step,val,train,rank\n1,5.5,,\n2,,0.81,4\n")
    run_folder.take_up(tmp_path, 3)
    write(tmp_path / "metrics.csv", "step,train,rank\n3,0.71,4\n")
    run_folder.join(tmp_path)
    found = [(row["step"], row["train"], row["val"], row["rank"]) for row in rows(tmp_path / "metrics.csv")]
    assert found == [("0", "1.0", "", ""), ("1", "0.9", "", ""), ("1", "", "5.5", ""), ("2", "0.81", "", "4"),
                     ("3", "0.71", "", "4")]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv"]


@pytest.mark.parametrize("goes_on_from", [None, 3])
def test_a_folder_that_cannot_be_written_to_is_one_line(goes_on_from):
    refused = pytest.raises(ConfigurationError, match="no run can be made in '/proc': .*hydra.run.dir")
    with refused, run_folder.held(Path("/proc"), goes_on_from):
        pass


def test_both_validations_of_a_checked_change_stay(tmp_path):
    write(tmp_path / "metrics.csv", "step,train,val\n1,0.9,\n2,,5.0\n2,,4.0\n2,0.8,\n")
    run_folder.take_up(tmp_path, 3)
    write(tmp_path / "metrics.csv", "step,val\n4,3.5\n4,3.0\n")
    run_folder.join(tmp_path)
    assert [row["val"] for row in rows(tmp_path / "metrics.csv") if row["val"]] == ["5.0", "4.0", "3.5", "3.0"]


def test_table_gets_its_headings_again_where_no_row_was_made_before_the_checkpoint(tmp_path):
    write(tmp_path / "generations.csv", "step,split,written\n6,val,a\n")
    run_folder.take_up(tmp_path, 4)
    assert not (tmp_path / "generations.csv").exists()


def test_a_folder_is_used_by_one_process_at_a_time(tmp_path):
    # A lock holds against the same process, too.
    mine = f"process {os.getpid()} on "
    with run_folder.held(tmp_path):
        for goes_on_from in (None, 2):
            with pytest.raises(ConfigurationError, match=mine), run_folder.held(tmp_path, goes_on_from):
                pass
    write(tmp_path / "metrics.csv", "step,a\n1,x\n2,y\n")
    with run_folder.held(tmp_path, goes_on_from=2):
        assert [row["a"] for row in rows(tmp_path / "metrics.earlier.csv")] == ["x"]


def test_a_new_run_takes_the_folder_of_one_without_a_checkpoint_and_of_no_other(tmp_path):
    for name in ("metrics.csv", "generations.csv", "rank_history.csv", "checkpoints/last.ckpt.part", "mine.txt"):
        write(tmp_path / name, "x")
    with run_folder.held(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {"mine.txt", ".lock"}
    write(tmp_path / "checkpoints" / "last.ckpt", "x")
    with pytest.raises(ConfigurationError, match="holds a run already"), run_folder.held(tmp_path):
        pass
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()
