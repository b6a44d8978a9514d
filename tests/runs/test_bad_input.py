"""What a user may get wrong on the command line: one message naming value and key, exit code 2, nothing left behind."""

from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn

import dynrank
from dynrank import train
from dynrank.commands import cli

CASES = [
    # (overrides, what the message must name); one or two for each that refuses, whose own tests have the others
    (["+trainer.max_step=3"], ["trainer.max_step is not a configuration key", "nearest: trainer.max_steps"]),
    (["seed=-1", "checkpoint_every=0"], ["seed", "checkpoint_every"]),
    (["trainer.max_steps=1e400"], ["trainer.max_steps"]),
    # The rank is refused before the model is loaded.
    (["lora.rank=0", "task.model=./missing"], ["0", "lora.rank"]),
    (["lora.target_modules=[qurey]"], ["qurey", "query", "lora.target_modules"]),
    (["rank_map.file=absent.yaml"], ["absent.yaml", "rank_map.file"]),
    (["rank_map.file=unmatched.yaml"], ["quary", "query"]),
    (["ckpt_path=last"], ["holds no run", "hydra.run.dir"]),
    (["task.model=./missing"], ["./missing", "task.model"]),
    (["trainer=slurm"], ["trainer.devices", "SLURM_NTASKS_PER_NODE", "srun"]),
    (["trainer=ddp", "trainer.strategy=ddp_spawn"], ["trainer.strategy=ddp_spawn", "set it to ddp"]),
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
        (["optimizer.name=Adamax"], ["Adamax", "optimizer.name", "schedule.how.optimizer_state=reset"]),
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


@pytest.mark.parametrize("environment", [{}, {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "GROUP_RANK": "0"}])
def test_sweep_whose_runs_take_several_processes_is_refused(launch, tmp_path, tiny_bert, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if environment:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "tests")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    several = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", f"task.model={tiny_bert}"]
    sweep = ["--multirun", "hydra.sweep.dir=sweep", "lora.rank=16,24"]
    code, _, message = launch(train.main, *sweep, "debug=smoke", *several)
    assert (code, "--multirun cannot make a run of 2 processes" in message) == (2, True)
    assert not list(tmp_path.rglob("checkpoints"))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["hydra.run.dir=/proc/x"], ["'/proc/x' cannot be made", "hydra.run.dir"]),
        (["hydra.run.dir=loop/x"], ["'loop/x' cannot be made: Too many levels"]),
        (["hydra.sweep.dir=file/x", "lora.rank=2,4", "--multirun"], ["'file/x' cannot be made", "hydra.sweep.dir"]),
        (["schedule=null"], ["schedule=fixed"]),
        (["rank_map.file=loop"], ["'loop'", "rank_map.file"]),
        (["ckpt_path=loop"], ["'loop'", "ckpt_path"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_train_refuses_places_and_texts_that_cannot_be_used(launch, tmp_path, overrides, named):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.rglob("*"))
    code, _, message = launch(train.main, *overrides)
    assert (code, message.count("\n"), sorted(tmp_path.rglob("*"))) == (2, 1, before), message
    assert all(text in message for text in named), message


VALUES = ["null", "true", "-1", "0", "1e400", "nan", "text", "''", "[]", "[1,a]", "{}", "{a:1}", "1.5", "99999999999"]


def keys_of(node, path=""):
    for key, value in node.items():
        inner = f"{path}.{key}" if path else str(key)
        yield inner
        if isinstance(value, dict):
            yield from keys_of(value, inner)


@cache
def keys_beside(schedule):
    return sorted({*keys_of(OmegaConf.to_container(dynrank.compose([f"schedule={schedule}"])))} - {"task.model"})


@settings(max_examples=20, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_any_value_of_any_key_is_taken_or_refused(launch, tiny_bert, data):
    schedule = data.draw(st.sampled_from(["after_convergence", "anneal", "early_budget", "auto", "milestones"]))
    overrides = ["debug=smoke", f"task.model={tiny_bert}", f"schedule={schedule}"]
    key = data.draw(st.sampled_from(keys_beside(schedule)))
    override = data.draw(st.sampled_from([f"{key}={value}" for value in VALUES] + [f"~{key}", f"{key}x=1"]))
    assert launch(cli.main, "ranks", *overrides, override)[0] in (0, 2)


def test_unknown_command_and_option_exit_with_2(launch):
    for main, argument in [(cli.main, "rnaks"), (cli.main, "--frobnicate"), (train.main, "--frobnicate")]:
        assert launch(main, argument)[0] == 2


@pytest.fixture
def adapter(tmp_path):
    """A small adapter on disk, rank 4."""
    model = dynrank.add_lora(nn.Sequential(nn.Linear(6, 8)), rank=4)
    dynrank.save_adapter(model, tmp_path / "adapter")


SQUEEZE = [
    ([], ["--rank", "--energy", "--budget", "none"]),
    (["--rank", "2", "--energy", "0.5"], ["--rank 2", "--energy 0.5"]),
    (["--rank", "0"], ["--rank", "0"]),
    (["--energy", "nan"], ["--energy", "nan"]),
    (["--budget", "13"], ["--budget", "13", "14"]),
    (["--budget", "half"], ["--budget", "half"]),
    (["--rank", "2", "--out", "used"], ["--out", "used"]),
]


@pytest.mark.parametrize(("options", "named"), SQUEEZE, ids=lambda value: " ".join(value))
@pytest.mark.usefixtures("adapter")
def test_squeeze_refuses(launch, tmp_path, options, named):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    out = [] if "--out" in options else ["--out", "out"]
    code, _, message = launch(cli.main, "squeeze", "adapter", *out, *options)
    assert code == 2
    assert all(text in message for text in named), message
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", [["squeeze", "absent", "--rank", "2", "--out", "out"], ["inspect", "absent"]])
def test_squeeze_and_inspect_refuse_a_folder_without_adapter(launch, tmp_path, command):
    code, _, message = launch(cli.main, *command)
    assert (code, "absent" in message) == (2, True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("plot", ["spectra.txt", "folder.png"])
@pytest.mark.usefixtures("adapter")
def test_inspect_refuses_a_picture_that_cannot_be_written(launch, tmp_path, plot):
    (tmp_path / "folder.png").mkdir()
    code, _, message = launch(cli.main, "inspect", "adapter", "--plot", plot)
    assert (code, "--plot" in message, plot in message) == (2, True, True)
