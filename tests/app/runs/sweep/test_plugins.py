"""Sweeps that a plugin of Hydra makes as jobs of SLURM."""

import pytest
from hydra import compose, initialize_config_module

import dynrank
from dynrank.app.runs import job
from dynrank.app.runs.run_meter import RunMeter
from dynrank.app.runs.trainer import make_trainer
from dynrank.callbacks import BestWeights
from dynrank.errors import ConfigurationError


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
