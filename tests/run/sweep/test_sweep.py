"""Whole sweeps in miniature: the experiment and its table, one that is killed and goes on, and runs that fail."""

import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dynrank
from dynrank import train
from dynrank.run import folder as run_folder
from dynrank.run import job
from dynrank.run.sweep import table as sweep_table

SMALL = ["debug=smoke", "trainer.enable_progress_bar=false", "task.limit=32"]


@pytest.fixture
def launch(monkeypatch, tmp_path, capsys):
    """Start a sweep in this process; returns its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["dynrank-train", "--multirun", *SMALL, *map(str, arguments)])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        try:
            train.main()
        except SystemExit as end:
            return end.code, capsys.readouterr()
        return 0, capsys.readouterr()

    return call


def table(folder):
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def measured(rows):
    """Rows without what depends on the clock."""
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def test_experiment_is_four_ranks_at_one_scaling():
    scalings = []
    for rank in (4, 8, 12, 16):
        config = dynrank.compose(["experiment=medical_rank_sweep", f"lora.rank={rank}"])
        scalings.append(config.lora.alpha / rank)
        assert config.schedule == {"_target_": "dynrank.schedules.fixed"}
    default = dynrank.compose().lora
    assert set(scalings) == {default.alpha / default.rank}


def test_experiment_in_miniature_ends_in_a_table(launch, tiny_bert, tmp_path):
    ranks = ["lora.rank=4,8", "seed=0,1"]
    code, printed = launch("experiment=medical_rank_sweep", f"task.model={tiny_bert}", "hydra.sweep.dir=s", *ranks)
    assert code == 0, printed.err
    rows, runs = table(tmp_path / "s"), [summary_of(tmp_path / "s" / str(number)) for number in range(4)]
    for row, pair in zip(rows, (runs[:2], runs[2:]), strict=True):
        for name, values in {
            "test/accuracy": [run["test"]["test/accuracy"] for run in pair],
            "gap": [run["final"]["val/loss"] - run["final"]["train/loss"] for run in pair],
            "adapter_parameters": [run["parameters"]["adapter"] for run in pair],
            "optimizer_bytes": [run["bytes"]["optimizer"] for run in pair],
            "step_seconds": [run["step_seconds"] for run in pair],
        }.items():
            assert float(row[name]) == pytest.approx(statistics.mean(values))
            assert float(row[f"{name}_sd"]) == pytest.approx(statistics.stdev(values), abs=1e-12)
    assert [row["lora.rank"] for row in rows] == ["4", "8"]
    assert "adapter parameters" in printed.out
    assert (tmp_path / "s" / "sweep.png").exists()
    for number, run in enumerate(runs):
        folder, trained = tmp_path / "s" / str(number), run["parameters"]
        adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert run["bytes"]["adapter"] == sum(t.nbytes for name, t in adapter.items() if "lora_" in name)
        assert run["bytes"]["gradients"] == sum(t.nbytes for t in adapter.values()) == 4 * trained["trainable"]
        (state,) = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"]
        tensors = [value for of_one in state["state"].values() for value in of_one.values()]
        assert run["bytes"]["optimizer"] == sum(tensor.nbytes for tensor in tensors)
        assert 0 < run["step_seconds"] <= run["phases"][0]["train_seconds"]


def test_targets_in_miniature_cost_what_their_layers_do(launch, tiny_bert, tmp_path):
    code, printed = launch("experiment=medical_targets", f"task.model={tiny_bert}", "hydra.sweep.dir=s", "seed=0")
    assert code == 0, printed.err
    widths = {"[query,value]": 4 * 64, "attention": 8 * 64, "all-linear": 8 * 64 + 4 * 96 + 64}  # d_in + d_out
    costs = {row["lora.target_modules"]: float(row["adapter_parameters"]) for row in table(tmp_path / "s")}
    assert costs == {name: 16 * width for name, width in widths.items()}
    assert all(name in printed.out for name in widths)


def test_sweep_that_is_killed_goes_on_and_ends_in_the_same_table(launch, tiny_bert, tmp_path):
    settings = [f"task.model={tiny_bert}", "sweep=rank", "lora.rank=2,4,6", "trainer.max_steps=40", "plots=false"]
    code, printed = launch(*settings, "hydra.sweep.dir=whole")
    assert code == 0, printed.err
    same = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(Path(train.__file__).parents[1])}
    child = subprocess.Popen(
        [sys.executable, "-m", "dynrank.train", "--multirun", *SMALL, *settings, "hydra.sweep.dir=s"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **same},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "s" / "1" / "checkpoints" / "last.ckpt").exists():
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        child.wait(timeout=30)
    finally:
        child.kill()
    ended = (tmp_path / "s" / "0" / "summary.json").stat()
    assert not (tmp_path / "s" / "1" / "summary.json").exists()
    assert not (tmp_path / "s" / "2").exists()

    code, printed = launch(*settings, "hydra.sweep.dir=s")
    assert (code, "0' holds a run already" in printed.err) == (2, True)
    assert not list((tmp_path / "s").rglob("error.txt"))  # the folders are not those of the runs that were refused
    code, printed = launch(*settings, "lora.rank=2,5,6", "hydra.sweep.dir=s", "ckpt_path=last")
    assert (code, "holds a run with lora.rank=4, not 5" in printed.err) == (2, True)

    code, printed = launch(*settings, "hydra.sweep.dir=s", "ckpt_path=last")
    assert code == 0, printed.err
    assert "has ended before" in printed.out
    assert (tmp_path / "s" / "0" / "summary.json").stat().st_mtime_ns == ended.st_mtime_ns
    assert measured(table(tmp_path / "s")) == measured(table(tmp_path / "whole"))
    for number in "012":
        one, two = (
            (tmp_path / folder / number / "adapter" / "adapter_model.safetensors").read_bytes()
            for folder in ("s", "whole")
        )
        assert one == two
    assert not list((tmp_path / "s").rglob("error.txt"))


def test_run_that_is_refused_stops_no_other_and_decides_the_exit_code(launch, tiny_bert, tmp_path, monkeypatch):
    settings = [f"task.model={tiny_bert}", "sweep=rank", "lora.rank=400,2", "plots=false"]
    code, printed = launch(*settings, "hydra.sweep.dir=s")
    assert code == 2
    last = printed.err.rpartition("error: ")[2]
    assert "min(d_in, d_out) = 32, got 400; fix lora.rank" in last
    assert "Traceback" not in printed.err
    assert [(row["lora.rank"], row["runs"], row["without_result"]) for row in table(tmp_path / "s")] == [
        ("2", "1", "0"),
        ("400", "0", "1"),
    ]
    assert "failed: ConfigurationError: " in printed.out
    # what goes wrong with the table does not take the place of that error
    monkeypatch.setattr(sweep_table, "show_sweep", lambda *_, **__: {}["broken"])
    code, printed = launch(*settings, "hydra.sweep.dir=t")
    assert code == 2
    assert "no table of the sweep: KeyError" in printed.err
    assert "got 400; fix lora.rank" in printed.err.rpartition("error: ")[2]


def test_run_that_crashes_stops_no_other_and_is_raised_at_the_end(launch, tmp_path, monkeypatch):
    def run(config, folder, *, record, **options):
        record()
        if config.lora.rank == 4:
            raise RuntimeError("out of memory")
        (folder / "summary.json").write_text(
            json.dumps({"test": {"test/loss": 1.0}, "parameters": {"adapter": 1}, "final": {"val/loss": 3.0}})
        )
        return summary_of(folder)

    monkeypatch.setattr(job, "run", run)
    with pytest.raises(RuntimeError, match="out of memory"):
        launch("sweep=rank", "lora.rank=4,8", "plots=false", "hydra.sweep.dir=s")
    assert (tmp_path / "s" / "0" / "error.txt").read_text().startswith("RuntimeError: out of memory\n")
    assert [row["without_result"] for row in table(tmp_path / "s")] == ["1", "0"]


def test_folder_of_a_run_without_a_checkpoint_is_free_again(tmp_path):
    run_folder.claim(tmp_path)
    for name in ("metrics.csv", "rank_predictions.csv", "rank_history.csv", "checkpoints/last.ckpt.part", "train.log"):
        (tmp_path / name).write_text("x")
    run_folder.release(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["train.log"]
    run_folder.claim(tmp_path)
    (tmp_path / "checkpoints" / "mine.txt").write_text("x")
    run_folder.release(tmp_path)
    assert (tmp_path / "checkpoints" / "mine.txt").exists()
