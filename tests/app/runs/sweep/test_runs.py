"""Whole sweeps in miniature: the experiments and their tables, runs that fail, and jobs of SLURM."""

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from tables import rows

import dynrank
from dynrank.app import train
from dynrank.app.runs import job
from dynrank.app.runs.run_meter import RunMeter
from dynrank.app.runs.summary import read_summary
from dynrank.app.runs.sweep import run_in_sweep, show_sweep
from dynrank.app.runs.trainer import make_trainer
from dynrank.callbacks import BestWeights
from dynrank.errors import ConfigurationError

SMALL = ["--multirun", "debug=smoke", "trainer.enable_progress_bar=false", "task.limit=32", "plots=false"]
SMALL += ["hydra.sweep.dir=s", "seed=0"]


@pytest.fixture
def sweep(launch, tiny_bert):
    """Makes a sweep of small runs in this process; returns its exit code, and what it printed to stdout and stderr."""
    return lambda *arguments: launch(train.main, *SMALL, f"task.model={tiny_bert}", *arguments)


def table():
    return rows(Path("s", "sweep.csv"))


def test_experiment_in_miniature_ends_in_a_table_of_its_runs_summaries(sweep):
    code, printed, said = sweep("experiment=medical_rank_sweep", "lora.rank=4,8")
    assert (code, "gap" in printed) == (0, True), said
    for row, rank, folder in zip(table(), "48", (Path("s/0"), Path("s/1")), strict=True):
        run = json.loads((folder / "summary.json").read_text())
        config = dynrank.read_run(folder).config
        assert (row["lora.rank"], config["schedule"]) == (rank, {"_target_": "dynrank.schedules.fixed"})
        for name, value in {
            "test/accuracy": run["test"]["test/accuracy"],
            "gap": run["final"]["val/loss"] - run["final"]["train/loss"],
            "adapter_parameters": run["parameters"]["adapter"],
            "tokens_per_second": run["tokens_per_second"],
            "peak_memory_bytes": run["peak_memory_bytes"],
        }.items():
            assert float(row[name]) == pytest.approx(value)


@pytest.fixture
def fail(monkeypatch):
    """Makes runs that end at once; those of rank 4 raise the given error, if any, and a refused one has not begun."""

    def replace(error):
        def run(config, folder, *, record, **options):
            # What follows from other values is set, too.
            assert config.trainer.max_steps
            fails = error is not None and config.lora.rank == 4
            if not (fails and isinstance(error, ConfigurationError)):
                (folder / ".hydra").mkdir()
                record()
            if fails:
                raise error
            summary = {"test": {"test/loss": 1.0}, "parameters": {"adapter": 1}, "final": {"val/loss": 3.0}}
            summary |= {"final_ranks": {}, "seconds": 1, "tokens_per_second": 1, "peak_memory_bytes": 1}
            (folder / "summary.json").write_text(json.dumps(summary))
            return read_summary(folder)

        monkeypatch.setattr(job, "run", run)

    return replace


@pytest.mark.parametrize(
    ("experiment", "key", "values"),
    [
        ("medical_rank_sweep", "lora.rank", ["4", "8", "12", "16"]),
        ("medical_targets", "lora.target_modules", ["[query,value]", "attention", "all-linear"]),
    ],
)
def test_experiments_have_a_run_for_each_value(sweep, fail, experiment, key, values):
    fail(None)
    # The runs do not measure this objective, as without a test.
    code, _, said = sweep(f"experiment={experiment}", "objective=val/accuracy")
    assert code == 0, said
    assert [row[key] for row in table()] == values


def test_a_sweeper_is_told_the_objective_at_the_final_weights(fail, tmp_path):
    fail(None)
    config = dynrank.compose(["lora.rank=8", "objective=val/loss"])
    assert run_in_sweep(config, [], tmp_path, lambda: None) == 3


def test_run_that_is_refused_stops_no_other_and_decides_the_exit_code(sweep, fail):
    fail(ConfigurationError("no rank of 4"))
    code, printed, said = sweep("sweep=rank", "lora.rank=4,8", "trainer.max_steps=null")
    assert (code, said.rpartition("error: ")[2]) == (2, "no rank of 4\n")
    assert "s/0: ConfigurationError: no rank of 4\n" in said
    # Said at the start, as Hydra calls no callback at the end of such a sweep.
    assert "dynrank sweep s" in printed
    show_sweep(Path("s"))
    assert [row["runs"] for row in table()] == ["1"]


def test_run_that_crashes_stops_no_other_and_is_raised_at_the_end(sweep, fail, capsys):
    fail(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        sweep("sweep=rank", "lora.rank=4,8")
    # The traceback stands where it happened, as Hydra raises only the first error.
    assert "s/0: RuntimeError: out of memory\nTraceback" in capsys.readouterr().err
    show_sweep(Path("s"))
    assert [(row["lora.rank"], row["runs"]) for row in table()] == [("4", "0"), ("8", "1")]


def test_slurm_launcher_composes_with_the_trainer_of_its_jobs(monkeypatch):
    overrides = ["trainer=slurm", "sweep=rank", "hydra/launcher=submitit_slurm", "hydra.launcher.nodes=2"]
    with initialize_config_module("dynrank.conf", version_base="1.3"):
        config = compose("train", overrides=overrides, return_hydra_config=True)
    assert config.hydra.launcher._target_.endswith(".SlurmLauncher")
    # Slurm sets these variables in such a job.
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "4")
    monkeypatch.setenv("SLURM_NNODES", "2")
    assert (config.trainer.devices, config.trainer.num_nodes, config.trainer.strategy) == (4, 2, "ddp")


def test_runs_of_several_processes_are_taken_in_jobs_of_slurm_alone(monkeypatch, tmp_path):
    config = dynrank.compose(["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"])
    arguments = (config, tmp_path, job.make_scheduler(config.schedule), RunMeter(), BestWeights("val/loss", "min"))
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    assert make_trainer(*arguments, sweep=True).world_size == 2
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    with pytest.raises(ConfigurationError, match="--multirun cannot make a run of 2 processes.*submitit_slurm"):
        make_trainer(*arguments, sweep=True)
