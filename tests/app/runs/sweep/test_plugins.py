"""Sweeps that Hydra's plugins make: Optuna's search by joblib's launcher, jobs of SLURM."""

import json
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.errors import MissingConfigException

import dynrank
from dynrank.app import train
from dynrank.app.runs import job
from dynrank.app.runs.overrides import usage_errors
from dynrank.app.runs.run_meter import RunMeter
from dynrank.app.runs.trainer import make_trainer
from dynrank.callbacks import BestWeights
from dynrank.errors import ConfigurationError


def test_optuna_finds_the_best_of_its_runs(tiny_bert, tmp_path, launch):
    """In this process: several at a time are joblib's own, and each would import everything anew."""
    arguments = ["--multirun", "debug=smoke", f"task.model={tiny_bert}", "task.limit=16", "plots=false"]
    arguments += ["sweep=optuna", "hydra/launcher=joblib", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=2"]
    arguments += ["hydra.launcher.n_jobs=1", "trainer.enable_progress_bar=false", "hydra.sweep.dir=s"]
    code, printed, said = launch(train.main, *arguments)
    assert code == 0, said
    assert "runs of the sweep" in printed
    best = yaml.safe_load(Path("s/optimization_results.yaml").read_text())
    folders = [tmp_path / "s" / number for number in "01"]
    runs = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    losses = [run["final"]["val/loss"] for run in runs]
    assert best["best_value"] == min(losses)
    for folder, run in zip(folders, runs, strict=True):
        (rank,) = set(run["final_ranks"].values())
        assert f"lora.rank={rank}" in yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text())
        if run["final"]["val/loss"] == min(losses):
            assert best["best_params"]["lora.rank"] == rank


@pytest.mark.parametrize(
    ("objective", "direction"), [("val/loss", "minimize"), ("val/wer", "minimize"), ("val/accuracy", "maximize")]
)
def test_optuna_looks_for_what_is_better(objective, direction):
    with initialize_config_module("dynrank.conf", version_base="1.3"):
        overrides = ["sweep=optuna", f"objective={objective}"]
        config = compose("train", overrides=overrides, return_hydra_config=True)
    assert config.hydra.sweeper.direction == direction


def test_optuna_without_an_objective_is_refused(launch):
    code, _, said = launch(train.main, "--multirun", "sweep=optuna", "objective=null", "hydra.sweep.dir=s")
    assert (code, "set objective=val/loss" in said) == (2, True), said


def test_slurm_launcher_composes_with_the_trainer_of_its_jobs(monkeypatch):
    job_of_eight = [f"hydra.launcher.{name}" for name in ("nodes=2", "tasks_per_node=4", "gpus_per_node=4")]
    with initialize_config_module("dynrank.conf", version_base="1.3"):
        overrides = ["trainer=slurm", "sweep=rank", "hydra/launcher=submitit_slurm", *job_of_eight]
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
    for other in (["local"], []):
        monkeypatch.delenv("SUBMITIT_EXECUTOR")
        for executor in other:
            monkeypatch.setenv("SUBMITIT_EXECUTOR", executor)
        with pytest.raises(ConfigurationError, match="--multirun cannot make a run of 2 processes.*submitit_slurm"):
            make_trainer(*arguments, sweep=True)


def test_missing_plugin_says_what_to_install(capsys):
    with pytest.raises(SystemExit) as caught, usage_errors():
        raise MissingConfigException("Could not find 'hydra/sweeper/optuna'", "hydra/sweeper/optuna")
    assert caught.value.code == 2
    assert "pip install 'dynrank[sweep]'" in capsys.readouterr().err
