"""A run that is stopped by a signal and resumed ends with exactly the weights of an uninterrupted one."""

import json
import os
import re
import signal
import time
import warnings
from pathlib import Path

import forked
import pytest
import torch
from torch.testing import assert_close

import dynrank
from dynrank.app import train
from dynrank.app.runs import job
from dynrank.app.runs.report.record import read_metrics

STEPS = 72
DROP = 24


@pytest.fixture(scope="module")
def settings(tiny_bert):
    settings = ["debug=smoke", f"task.model={tiny_bert}", f"trainer.max_steps={STEPS}", "checkpoint_every=4"]
    settings += ["schedule=after_convergence", f"schedule.deadline={DROP / STEPS}", "lora.rank=6"]
    return [*settings, "schedule.final_rank=2", "plots=false", "trainer.enable_progress_bar=false"]


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """The folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        job.run(dynrank.compose(settings), folder)
    return folder


def stopped(settings, number, after):
    """Send a signal to a run in ./run once its checkpoint holds ``after`` steps; returns its exit code and output."""
    child = forked.start(forked.TRAIN, *settings, "hydra.run.dir=run", cwd=Path.cwd())
    try:
        while saved_step(Path("run/checkpoints/last.ckpt")) < after:
            assert child.is_alive(), forked.printed(Path.cwd())
            time.sleep(0.05)
        os.kill(child.pid, number)
    finally:
        (code,) = forked.end([child])
    return code, forked.printed(Path.cwd())


def saved_step(file):
    return torch.load(file, weights_only=True)["global_step"] if file.exists() else -1


def assert_same(folder, whole):
    """Weights, optimizer and files of two runs are exactly equal."""
    one, two = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (folder, whole))
    assert one["global_step"] == two["global_step"] == STEPS
    tensors = {name: value for name, value in two["state_dict"].items() if isinstance(value, torch.Tensor)}
    assert_close({name: one["state_dict"][name] for name in tensors}, tensors, rtol=0, atol=0)
    assert_close(*(of["optimizer_states"][0]["state"] for of in (one, two)), rtol=0, atol=0)
    for name in ("adapter/adapter_model.safetensors", "rank_history.csv"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize(
    ("number", "after", "code"),
    [(signal.SIGKILL, DROP + 4, -9), (signal.SIGTERM, 4, 0), (signal.SIGINT, 4, 130)],
    ids=["killed after the drop", "SIGTERM before it", "Ctrl-C before it"],
)
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(launch, settings, whole, number, after, code):
    returned, said = stopped(settings, number, after)
    assert returned == code, said
    saved = saved_step(Path("run/checkpoints/last.ckpt"))
    again = [*settings, "hydra.run.dir=run", "ckpt_path=last"]
    if number != signal.SIGKILL:
        reason = "SIGTERM" if number == signal.SIGTERM else "Ctrl-C"
        (keys,) = re.findall(rf"{reason}: stopped after step {saved}; go on by the same command with (.*)", said)
        again = [*settings, *keys.split()]
    assert {path.name for path in Path("run/.hydra").iterdir()} == {"config.yaml", "hydra.yaml", "overrides.yaml"}
    code, printed, message = launch(train.main, *again)
    assert (code, message) == (0, "")
    (step,) = re.search(r"goes on from +step (\d+), ", printed).groups()
    assert int(step) == saved
    assert_same(Path("run"), whole)
    for metric in ("train/loss", "val/loss"):
        one, two = (
            dict(zip(*read_metrics(folder / "metrics.csv")[metric], strict=True)) for folder in (Path("run"), whole)
        )
        # Lightning leaves out the validation that was due when its checkpoint was written.
        assert one == {key: value for key, value in two.items() if key in one or key != saved - 1}


@pytest.mark.parametrize("place", ["BestWeights.on_train_end", "job.export"])
def test_a_run_that_is_killed_after_its_last_step_trains_no_step_again(launch, settings, whole, place):
    """Also if the last multiple of ``checkpoint_every`` is long ago."""
    command = [*settings, "checkpoint_every=50", "hydra.run.dir=run"]
    killed = "import os; from dynrank.app.runs import job; from dynrank.callbacks import BestWeights; "
    killed += f"{place} = lambda *_: os.kill(os.getpid(), 9); "
    code, said = forked.run(killed + forked.TRAIN, *command, cwd=Path.cwd())
    assert code == -signal.SIGKILL, said
    assert not Path("run/summary.json").exists()
    code, printed, message = launch(train.main, *command, "ckpt_path=last")
    assert (code, message) == (0, "")
    assert f"step {STEPS}, " in printed
    assert json.loads(Path("run/summary.json").read_text())["tokens_per_second"] == 0
    assert_same(Path("run"), whole)
    one, two = (read_metrics(folder / "metrics.csv")["val/loss"] for folder in (Path("run"), whole))
    assert one == two


def test_the_folder_of_a_finished_run_is_taken(launch, settings, whole):
    files = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    for more, said in (("seed=1", "needs a new or empty folder"), ("ckpt_path=last", "that has not ended")):
        code, _, message = launch(train.main, *settings, more, f"hydra.run.dir={whole}")
        assert (code, said in message) == (2, True)
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == files


def test_a_run_from_the_end_of_another_only_tests_and_exports(launch, settings, whole):
    file = whole / "checkpoints" / "last.ckpt"
    code, _, message = launch(train.main, *settings, "hydra.run.dir=again", f"ckpt_path={file}")
    assert (code, message) == (0, "")
    adapter = "adapter/adapter_model.safetensors"
    assert (whole / adapter).read_bytes() == Path("again", adapter).read_bytes()


@pytest.mark.parametrize(
    ("override", "stored", "named"),
    [
        ("lora.target_modules=attention", {}, r"\['model.bert.encoder.layer.0.intermediate.dense.* differ"),
        ("optimizer=sgd", {}, r"optimizer\.name is 'AdamW' there, and 'SGD' here"),
        # The head has their number, so that its weights would be loaded for them.
        ("seed=0", {"labels": ["b", "a"]}, r"labels is \['b', 'a'\] there, and \['A00-A09', "),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(override, stored, named, launch, settings, whole):
    checkpoint = torch.load(whole / "checkpoints" / "last.ckpt")
    checkpoint["hyper_parameters"] |= stored
    torch.save(checkpoint, "other.ckpt")
    code, _, said = launch(train.main, *settings, override, "hydra.run.dir=run", "ckpt_path=other.ckpt")
    assert code == 2
    assert re.search(rf"{named}.*ckpt_path", said, re.DOTALL), said
    assert not [*Path("run").glob("*")]
