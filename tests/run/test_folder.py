"""ckpt_path=last: an interrupted run goes on in its own folder, and its files are those of one that was not."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dynrank import train
from dynrank.errors import ConfigurationError
from dynrank.run import folder as run_folder

STEPS = 60


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_tables_are_joined_at_the_step_that_a_run_goes_on_from(tmp_path):
    write(tmp_path / "metrics.csv", "step,train,val\n0,1.0,\n1,0.9,\n1,,5.0\n2,0.8,\n3,0.7\n4,")
    write(tmp_path / "rank_predictions.csv", "step,layer,reason\n1,a,x\n1,b,x\n2,a,y\n")
    run_folder.take_up(tmp_path, 2)
    assert not (tmp_path / "metrics.csv").exists()
    assert [row["layer"] for row in table(tmp_path / "rank_predictions.csv")] == ["a", "b"]
    write(tmp_path / "metrics.csv", "step,val,train,rank\n1,5.5,,\n2,,0.81,4\n")
    run_folder.take_up(tmp_path, 3)  # killed again
    write(tmp_path / "metrics.csv", "step,train,rank\n3,0.71,4\n")
    run_folder.join(tmp_path)
    found = [(row["step"], row["train"], row["val"], row["rank"]) for row in table(tmp_path / "metrics.csv")]
    assert found == [("0", "1.0", "", ""), ("1", "0.9", "", ""), ("1", "", "5.5", ""), ("2", "0.81", "", "4"),
                     ("3", "0.71", "", "4")]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "rank_predictions.csv"]


def test_what_ckpt_path_means(tmp_path):
    assert run_folder.checkpoint_of(tmp_path, None) is None
    assert run_folder.checkpoint_of(tmp_path, "a/b.ckpt") == Path("a/b.ckpt")
    with pytest.raises(ConfigurationError, match=r"best.*ckpt_path=last"):
        run_folder.checkpoint_of(tmp_path, "best")
    with pytest.raises(ConfigurationError, match=r"holds no run.*hydra\.run\.dir"):
        run_folder.checkpoint_of(tmp_path, "last")
    write(tmp_path / "checkpoints" / "last.ckpt", "")
    assert run_folder.checkpoint_of(tmp_path, "last") == tmp_path / "checkpoints" / "last.ckpt"
    write(tmp_path / "summary.json", "{}")
    with pytest.raises(ConfigurationError, match="has ended"):
        run_folder.checkpoint_of(tmp_path, "last")


@pytest.fixture
def launch(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["dynrank-train", *arguments])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        try:
            train.main()
        except SystemExit as end:
            return end.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return call


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Experiment logs directory")
def test_run_stopped_by_sigterm_goes_on_in_its_folder(launch, tiny_bert, tmp_path):
    settings = ["debug=smoke", f"task.model={tiny_bert}", f"trainer.max_steps={STEPS}", "lora.rank=6"]
    settings += ["schedule.final_rank=2", "schedule.deadline=0.5", "checkpoint_every=4", "plots=false"]
    assert launch(*settings, "hydra.run.dir=whole") == (0, "")
    same = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(Path(train.__file__).parents[1])}
    child = subprocess.Popen(
        [sys.executable, "-m", "dynrank.train", *settings, "hydra.run.dir=run"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **same},
    )  # fmt: skip
    try:
        while not Path("run/checkpoints/last.ckpt").exists():
            assert child.poll() is None, child.stderr.read()
            time.sleep(0.01)
        child.send_signal(signal.SIGTERM)
        said = child.communicate(timeout=60)[1]
    finally:
        child.kill()
    assert child.returncode == 0
    assert re.search(r"SIGTERM: stopped after step \d+; go on with ckpt_path=\S*run/checkpoints/last\.ckpt", said)
    hydra = {path.name: path.read_text() for path in Path("run/.hydra").iterdir()}
    assert hydra.keys() == {"config.yaml", "hydra.yaml", "overrides.yaml"}

    code, message = launch(*settings, "seed=1", "hydra.run.dir=run")
    assert (code, "holds a run already" in message) == (2, True)
    assert {path.name: path.read_text() for path in Path("run/.hydra").iterdir()} == hydra

    assert launch(*settings, "hydra.run.dir=run", "ckpt_path=last") == (0, "")
    for name in ("adapter/adapter_model.safetensors", "rank_history.csv", "rank_predictions.csv", "final_ranks.yaml"):
        assert Path("run", name).read_bytes() == Path("whole", name).read_bytes(), name
    one, two = ([row for row in table(Path(folder, "metrics.csv")) if row["train/loss"]] for folder in ("run", "whole"))
    assert [(row["step"], row["train/loss"]) for row in one] == [(row["step"], row["train/loss"]) for row in two]
    one, two = (
        sorted({r["val/loss"] for r in table(Path(f, "metrics.csv")) if r["val/loss"]}) for f in ("run", "whole")
    )
    assert one == two
    code, message = launch(*settings, "hydra.run.dir=run", "ckpt_path=last")
    assert (code, "has ended" in message) == (2, True)
