"""A run killed with SIGKILL and resumed ends bit-equal to one that was never stopped: real processes, real model."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

STEPS = 24
# the drop comes at step 9 of 24; a checkpoint every 2 steps, a validation every 4
SETTINGS = ["debug=smoke", f"trainer.max_steps={STEPS}", "schedule.deadline=0.34", "checkpoint_every=2", "plots=false"]
SETTINGS += ["optimizer.warmup_steps=2", "schedule.rewarmup_steps=4"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, run_command):
    folder = tmp_path_factory.mktemp("whole")
    done = run_command("dynrank-train", *SETTINGS, "hydra.run.dir=run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def started(folder):
    command = [str(Path(sys.executable).parent / "dynrank-train"), *SETTINGS, "hydra.run.dir=killed"]
    # 4 steps a second and more: slow enough to hit a certain step
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def saved_step(file):
    try:
        return torch.load(file, weights_only=True)["global_step"]
    except FileNotFoundError:
        return -1


def kill_after_step(folder, step):
    """SIGKILL a fresh run at a random moment once its checkpoint holds at least ``step`` steps."""
    process = started(folder)
    file = folder / "killed" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while saved_step(file) < step:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "no checkpoint in two minutes"
        time.sleep(0.02)
    time.sleep(random.uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    process.wait()
    return file


def rows(folder, name):
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("after", [2, 10], ids=["before the drop", "after the drop"])
def test_killed_run_resumes_to_the_same_bits(uninterrupted, tmp_path, run_command, after):
    file = kill_after_step(tmp_path, after)
    done = run_command("dynrank-train", *SETTINGS, "hydra.run.dir=resumed", f"ckpt_path={file}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    whole, resumed = (
        torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (uninterrupted, tmp_path / "resumed")
    )
    assert whole["global_step"] == resumed["global_step"] == STEPS
    assert whole["state_dict"].keys() == resumed["state_dict"].keys()
    for name, value in whole["state_dict"].items():
        if isinstance(value, torch.Tensor):  # of the base no more is there than a mark to know it by
            assert torch.equal(value, resumed["state_dict"][name]), name
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (whole, resumed)]
    for index, state in states[0].items():
        for key, value in state.items():
            assert torch.equal(value, states[1][index][key]), (index, key)
    adapter = "adapter/adapter_model.safetensors"
    assert (uninterrupted / adapter).read_bytes() == (tmp_path / "resumed" / adapter).read_bytes()
    assert rows(uninterrupted, "rank_history.csv") == rows(tmp_path / "resumed", "rank_history.csv")


def test_resuming_twice_from_one_checkpoint_gives_the_same_run(uninterrupted, tmp_path, run_command):
    file = uninterrupted / "checkpoints" / "last.ckpt"  # the end: nothing is left to train, test and export remain
    for name in ("first", "second"):
        done = run_command("dynrank-train", *SETTINGS, f"hydra.run.dir={name}", f"ckpt_path={file}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    adapters = [
        (f / "adapter/adapter_model.safetensors").read_bytes()
        for f in (uninterrupted, tmp_path / "first", tmp_path / "second")
    ]
    assert adapters[0] == adapters[1] == adapters[2]


def test_a_checkpoint_of_another_model_is_an_error(uninterrupted, tmp_path, run_command):
    file = uninterrupted / "checkpoints" / "last.ckpt"
    other = [*SETTINGS, "lora.target_modules=attention", "hydra.run.dir=run", f"ckpt_path={file}"]
    done = run_command("dynrank-train", *other, cwd=tmp_path)
    assert done.returncode == 2
    assert "of another model" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_broken_checkpoint_is_an_error(uninterrupted, tmp_path, run_command):
    whole = (uninterrupted / "checkpoints" / "last.ckpt").read_bytes()
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(whole[: len(whole) // 2])
    done = run_command("dynrank-train", *SETTINGS, "hydra.run.dir=run", f"ckpt_path={broken}", cwd=tmp_path)
    assert done.returncode == 2
    assert "broken.ckpt" in done.stderr
    assert "Traceback" not in done.stderr
