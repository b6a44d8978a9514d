"""``dynrank-train`` in two real processes, however they are started: one run's files, written once."""

import json
import math
import signal
import time

import forked
import pytest
import torch
from kept import keep_checkpoints
from safetensors.torch import load_file
from tables import rows
from torch.testing import assert_close

import dynrank
from dynrank.app.runs import job
from dynrank.app.runs.report.record import read_metrics

# Lightning gives advice about small data.
pytestmark = pytest.mark.filterwarnings("ignore")
SAVED = 7
CHANGE = 9
STEPS = 12
LONG = ["schedule=after_convergence"]
LONG += ["trainer.max_steps=100000", "trainer.val_check_interval=100000", f"schedule.deadline={CHANGE / 100000}"]


@pytest.fixture
def cwd(tmp_path):
    """Where commands are started."""
    (tmp_path / "cwd").mkdir()
    return tmp_path / "cwd"


@pytest.fixture(scope="module")
def overrides(tiny_bert):
    """A run of 16 examples a step over all processes, which saves before its ranks change, and at its end."""
    return [
        "debug=smoke", "schedule=after_convergence", f"task.model={tiny_bert}",
        "task.batch_size=8", f"trainer.max_steps={STEPS}", "lora.rank=6",
        "lora.alpha=6", "schedule.final_rank=2", f"schedule.deadline={CHANGE / STEPS}", f"checkpoint_every={SAVED}",
        "schedule.shared=false", "optimizer=sgd", "optimizer.lr=0.5", "plots=false", "trainer.accelerator=cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alone(overrides, tmp_path_factory):
    """The folder of the run as one process makes it; beside it is the checkpoint from before the change."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patch:
        keep_checkpoints(folder.parent, patch.setattr)
        job.run(dynrank.compose([*overrides, "task.batch_size=16"]), folder)
    return folder


def pair(folder, *overrides):
    return forked.pair(forked.TRAIN, *overrides, "trainer=ddp", "trainer.devices=2", cwd=folder)


def wait_for(condition, process):
    # Other programs may keep the machine busy.
    deadline = time.monotonic() + 400
    while not condition() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)


def one_run(cwd, codes):
    """The folder that all processes with these exit codes have written, once."""
    printed = forked.printed(cwd)
    assert set(codes) == {0}, printed
    (folder,) = cwd.glob("outputs/*/*")
    assert not [path for path in cwd.rglob("*") if path.is_file() and not path.is_relative_to(folder)]
    assert not [*folder.rglob("*.part")]
    for text in ("rank change at step", "test/accuracy", "files  "):
        assert printed.count(text) == 1, printed
    assert "Traceback" not in printed
    return folder


def assert_same_adapter(folder, alone):
    one, two = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (folder, alone))
    assert_close(one, two, rtol=0, atol=1e-5)


def step_of(checkpoint):
    return torch.load(checkpoint, weights_only=True)["global_step"]


def test_ddp_started_by_lightning_and_resumed_in_one_process(overrides, alone, cwd, tmp_path):
    """As a user starts it: Lightning starts the second process, in a new interpreter."""
    command = [*overrides, "trainer=ddp", "trainer.devices=2"]
    keeping = f"import kept, runpy; kept.keep_checkpoints({str(tmp_path)!r}); "
    keeping += "runpy.run_module('dynrank.train', run_name='__main__', alter_sys=True)"
    code, _ = forked.run(keeping, *command, cwd=cwd, PYTHONWARNINGS="ignore")
    folder = one_run(cwd, [code])
    # It is what one process wrote that took the batches of both.
    assert_same_adapter(folder, alone)
    one, two = (json.loads((f / "summary.json").read_text()) for f in (folder, alone))
    assert one["final_ranks"] == two["final_ranks"]
    assert one["test"] == pytest.approx(two["test"], abs=1e-5)
    one, two = ([(row["step"], row["layer"]) for row in rows(f / "rank_history.csv")] for f in (folder, alone))
    assert one == two
    one, two = (read_metrics(f / "metrics.csv")["val/loss"] for f in (folder, alone))
    assert (one[0], one[1]) == (two[0], pytest.approx(two[1], abs=1e-5))
    assert step_of(folder / "checkpoints" / "last.ckpt") == STEPS

    checkpoint = tmp_path / f"step={SAVED}.ckpt"
    job.run(dynrank.compose([*overrides, "task.batch_size=16", f"ckpt_path='{checkpoint}'"]), tmp_path / "resumed")
    assert_same_adapter(tmp_path / "resumed", alone)


def test_fsdp2_started_by_torchrun_goes_on_from_one_process(overrides, alone, cwd):
    checkpoint = alone.parent / f"step={SAVED}.ckpt"
    torchrun = ["--nproc-per-node", "2", "--master-port", forked.free_port(), "-m", "dynrank.train"]
    command = [*overrides, "trainer=fsdp2", f"ckpt_path='{checkpoint}'", "checkpoint_every=10"]
    program = "from torch.distributed.run import main; main()"
    code, _ = forked.run(program, *torchrun, *command, cwd=cwd, PYTHONWARNINGS="ignore")
    assert_same_adapter(one_run(cwd, [code]), alone)


def test_run_resumes_after_one_process_got_sigterm_or_was_killed(overrides, cwd, tmp_path):
    """Two go on after each; the end knows no step twice."""
    folder = tmp_path / "run"
    checkpoint = folder / "checkpoints" / "last.ckpt"
    command = [*overrides, *LONG, f"hydra.run.dir={folder}"]
    first, second = pair(cwd, *command)
    try:
        wait_for(lambda: checkpoint.exists(), first)
        # A machine that is taken away ends its processes like this.
        second.terminate()
    finally:
        codes = forked.end([first, second])
        printed = forked.printed(cwd)
    assert codes == [0, 0], printed
    assert "Traceback" not in printed
    stopped = step_of(checkpoint)
    advice = f"go on by the same command with ckpt_path=last hydra.run.dir={folder}\n"
    assert printed.count(f"SIGTERM: stopped after step {stopped}; {advice}") == 1

    written = checkpoint.stat().st_mtime_ns
    first, second = pair(cwd, *command, "ckpt_path=last")
    try:
        wait_for(lambda: checkpoint.stat().st_mtime_ns > written, first)
        time.sleep(0.5)
    finally:
        # Nobody watches over the processes, so process 0 has to notice by itself.
        second.kill()
        codes = forked.end([first, second])
        printed = forked.printed(cwd)
    assert codes == [1, -signal.SIGKILL], printed
    assert "by peer" in printed

    saved = step_of(checkpoint)
    # One of any four steps ends in a validation, which the schedule's trigger reads.
    steps = saved + 4
    assert saved > max(stopped, CHANGE)
    last = ["ckpt_path=last", f"trainer.max_steps={steps}", f"schedule.deadline={CHANGE / steps}"]
    assert forked.end(pair(cwd, *overrides, *last, f"hydra.run.dir={folder}")) == [0, 0], forked.printed(cwd)
    assert set(json.loads((folder / "summary.json").read_text())["final_ranks"].values()) == {2}
    found = [int(row["step"]) for row in rows(folder / "metrics.csv", "train/loss")]
    assert found == sorted(set(found))
    # The row of this step is written after its checkpoint.
    assert {*range(steps)} - {*found} <= {saved - 1}


def test_means_over_two_processes_count_each_token_once(tiny_llama, tmp_path):
    """The loss is the logarithm of the perplexity, which adds up its counts by itself."""
    lines = [json.dumps({"prompt": f"def f{i}(x):", "answer": " return x" * (1 + i % 7)}) for i in range(150)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    command = [
        "debug=smoke", "task=completion", f"task.model={tiny_llama}", "data.train=rows.jsonl", "task.val_examples=7",
        "task.batch_size=2", "task.val_generate=3", "task.generate=5", "task.max_new_tokens=48", "plots=false",
        "trainer.accelerator=cpu", "trainer.max_steps=4", "trainer.val_check_interval=2", "hydra.run.dir=run",
    ]  # fmt: skip
    assert forked.end(pair(tmp_path, *command)) == [0, 0], forked.printed(tmp_path)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test"]["test/loss"] == pytest.approx(math.log(summary["test"]["test/perplexity"]), rel=1e-5)
    metrics = read_metrics(tmp_path / "run" / "metrics.csv")
    losses, perplexities, bleu = (metrics[f"val/{name}"][1] for name in ("loss", "perplexity", "bleu"))
    assert len(losses) == len(bleu) == 2
    assert losses == pytest.approx([math.log(perplexity) for perplexity in perplexities], rel=1e-5)
