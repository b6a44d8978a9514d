"""What a user may get wrong on the command line: one message naming value and key, exit code 2, nothing left behind."""

from pathlib import Path

import pytest
from torch import nn

import dynrank
from dynrank.app import train
from dynrank.app.commands import cli

CASES = [
    # (overrides, what the message must name); one or two for each that refuses, whose own tests have the others
    (["+trainer.max_step=3"], ["trainer.max_step is not a configuration key", "nearest: trainer.max_steps"]),
    (["seed=-1", "checkpoint_every=0"], ["seed", "checkpoint_every"]),
    (["trainer.max_steps=1e400"], ["trainer.max_steps"]),
    (["trainer.max_steps=-1", "trainer.max_epochs=-1"], ["trainer.max_epochs=-1", "trainer.max_steps"]),
    (["trainer.fast_dev_run=true"], ["trainer.fast_dev_run=True", "debug=smoke"]),
    # The rank is refused before the model is loaded.
    (["lora.rank=0", "task.model=./missing"], ["0", "lora.rank"]),
    (["lora.target_modules=[qurey]"], ["qurey", "query", "lora.target_modules"]),
    (["rank_map.file=absent.yaml"], ["absent.yaml", "rank_map.file"]),
    (["rank_map.file=unmatched.yaml"], ["quary", "query"]),
    (["ckpt_path=last"], ["holds no run", "hydra.run.dir"]),
    (["task.model=./missing"], ["./missing", "task.model"]),
    (["task.max_length=1"], ["1", "task.max_length"]),
    (["data.code_length=0"], ["0", "data.code_length"]),
    (["model.quantization=int3"], ["int3", "model.quantization"]),
    (["trainer=slurm"], ["trainer.devices", "SLURM_NTASKS_PER_NODE", "srun"]),
    (["trainer=ddp", "trainer.strategy=ddp_spawn"], ["trainer.strategy=ddp_spawn", "set it to ddp"]),
    (["schedule=early_buget"], ["schedule/early_buget", "early_budget"]),
    (["hydra/launcher=submitit_nowhere"], ["hydra/launcher/submitit_nowhere"]),
    (["schedule.final_rank=64"], ["64", "schedule.final_rank"]),
    (["schedule.how.optimizer_state=los"], ["los", "schedule.how.optimizer_state"]),
    (["objective=val/los"], ["objective must be null or one of", "'val/loss'", "'val/los'"]),
    (
        ["schedule=after_convergence", "schedule.trigger.monitor=val/los"],
        ["val/los", "val/loss", "schedule.trigger.monitor"],
    ),
    (
        ["schedule=after_convergence", "schedule.trigger.warmup_steps=10"],
        ["stage 1", "deadline 0.75", "step 9", "10", "schedule.deadline"],
    ),
    (["schedule=early_budget", "schedule.share=0.02"], ["stage 1", "27,033", "42,240", "schedule.share"]),
]


@pytest.mark.parametrize(("overrides", "named"), CASES, ids=lambda value: " ".join(value))
def test_train_refuses_before_training(launch, monkeypatch, overrides, named):
    # The tests themselves may run in a job of Slurm.
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    Path("unmatched.yaml").write_text("rank_pattern: {quary: 8}")
    code, _, message = launch(train.main, "debug=smoke", "hydra.run.dir=run", *overrides)
    assert code == 2
    assert all(text in message for text in named), message
    assert not Path("run").exists()


def test_a_refused_run_removes_only_empty_folders(launch, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "mine").write_text("kept")
    for folder in ("outputs/today/now", elsewhere / "run", "."):
        assert launch(train.main, "lora.rank=0", f"hydra.run.dir={folder}")[0] == 2
    assert not Path("outputs").exists()
    assert [*elsewhere.iterdir()] == [elsewhere / "mine"]
    assert Path.cwd().is_dir()


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["optimizer.name=Adamax"], ["Adamax", "optimizer.name", "schedule.how.optimizer_state"]),
        (["optimizer.decay=fast"], ["'fast'", "optimizer.decay"]),
        (["schedule.how.lr_factor=-1"], ["-1", "schedule.how.lr_factor"]),
        (["+logger.x={_target_: nowhere.Logger}"], ["nowhere.Logger", "logger.x"]),
        (
            ["trainer=fsdp2", "trainer.accelerator=cpu", "trainer.strategy.tensor_parallel_size=2"],
            ["tensor_parallel_size=1"],
        ),
    ],
    ids=lambda value: " ".join(value),
)
def test_train_refuses_what_only_the_run_shows(launch, tiny_bert, overrides, named):
    tiny = [f"task.model={tiny_bert}", "lora.rank=8"]
    code, _, message = launch(train.main, "debug=smoke", "hydra.run.dir=run", *tiny, *overrides)
    assert code == 2
    assert all(text in message for text in named), message
    assert not list(Path("run").rglob("*.csv"))


def test_sweep_whose_runs_take_several_processes_is_refused(launch, tmp_path, tiny_bert):
    several = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", f"task.model={tiny_bert}"]
    code, _, message = launch(train.main, "--multirun", "hydra.sweep.dir=sweep", "debug=smoke", *several)
    assert (code, "--multirun cannot make a run of 2 processes" in message) == (2, True)
    assert [*tmp_path.joinpath("sweep").iterdir()] == [tmp_path / "sweep" / "multirun.yaml"]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["hydra.run.dir=/proc/x"], ["'/proc/x' cannot be made", "hydra.run.dir"]),
        (["hydra.sweep.dir=mine/x", "lora.rank=2,4", "--multirun"], ["'mine/x' cannot be made", "hydra.sweep.dir"]),
        (["schedule=null"], ["schedule=fixed"]),
        (["rank_map.file=mine"], ["'mine'", "rank_map.file"]),
        (["ckpt_path=mine"], ["'mine'", "ckpt_path"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_train_refuses_places_and_texts_that_cannot_be_used(launch, tmp_path, overrides, named):
    (tmp_path / "mine").write_text("not a folder")
    before = sorted(tmp_path.rglob("*"))
    code, _, message = launch(train.main, *overrides)
    assert (code, message.count("\n"), sorted(tmp_path.rglob("*"))) == (2, 1, before), message
    assert all(text in message for text in named), message


REFUSED = [
    # (a command, what the message must name)
    ("rnaks", ["rnaks"]),
    ("--frobnicate", ["--frobnicate"]),
    ("squeeze adapter --out out", ["--rank", "--energy", "--budget", "none"]),
    ("squeeze adapter --out out --rank 2 --energy 0.5", ["rank=2, energy=0.5", "--rank", "--energy"]),
    ("squeeze adapter --out out --rank 0", ["--rank", "0"]),
    ("squeeze adapter --out out --energy nan", ["--energy", "nan"]),
    ("squeeze adapter --out out --budget 13", ["--budget", "13", "14"]),
    ("squeeze adapter --out out --budget half", ["--budget", "half"]),
    ("squeeze adapter --out used.png --rank 2", ["--out", "used.png"]),
    ("squeeze absent --out out --rank 2", ["absent"]),
    ("inspect absent", ["absent"]),
    ("inspect adapter --plot spectra.txt", ["--plot", "spectra.txt"]),
    ("inspect adapter --plot used.png", ["--plot", "used.png"]),
]


@pytest.mark.parametrize(("command", "named"), REFUSED, ids=str)
def test_dynrank_refuses_and_writes_nothing(launch, tmp_path, command, named):
    model = dynrank.add_lora(nn.Sequential(nn.Linear(6, 8)), rank=4)
    dynrank.save_adapter(model, tmp_path / "adapter")
    (tmp_path / "used.png").mkdir()
    (tmp_path / "used.png" / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    code, _, message = launch(cli.main, *command.split())
    assert code == 2
    assert all(text in message for text in named), message
    assert sorted(tmp_path.rglob("*")) == before
