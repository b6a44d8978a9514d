"""Whole sweeps in miniature: the experiment and its table, one that is killed and goes on, and runs that fail."""

import json
from pathlib import Path

import pytest
from tables import rows

import dynrank
from dynrank.app import train
from dynrank.app.runs import job
from dynrank.app.runs.summary import read_summary
from dynrank.app.runs.sweep import run_in_sweep, show_sweep
from dynrank.errors import ConfigurationError

SMALL = ["--multirun", "debug=smoke", "trainer.enable_progress_bar=false", "task.limit=32", "plots=false"]


@pytest.fixture
def sweep(launch, tiny_bert):
    """Makes a sweep of small runs in this process; returns its exit code, and what it printed to stdout and stderr."""
    return lambda *arguments: launch(train.main, *SMALL, f"task.model={tiny_bert}", *arguments)


def table(folder):
    return rows(Path(folder, "sweep.csv"))


def test_experiment_is_four_ranks_at_one_scaling():
    configs = [dynrank.compose(["experiment=medical_rank_sweep", f"lora.rank={rank}"]) for rank in (4, 8, 12, 16)]
    models = [job.build(config, on_meta=True).module.model for config in configs]
    # Alpha is twice the rank unless it is given.
    assert {layer.scaling for model in models for _, layer in dynrank.lora_layers(model)} == {2.0}
    assert all(config.schedule == {"_target_": "dynrank.schedules.fixed"} for config in configs)


def test_experiment_in_miniature_ends_in_a_table_of_its_runs_summaries(sweep):
    code, printed, said = sweep("experiment=medical_rank_sweep", "hydra.sweep.dir=s", "lora.rank=4,8", "seed=0")
    assert code == 0, said
    assert "gap" in printed
    for row, rank, folder in zip(table("s"), "48", (Path("s/0"), Path("s/1")), strict=True):
        run = json.loads((folder / "summary.json").read_text())
        assert row["lora.rank"] == rank
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
    """Makes runs that end at once, those of rank 4 with the given error; a refused one has not begun."""

    def replace(error):
        def run(config, folder, *, record, **options):
            # What follows from other values is set, too.
            assert config.trainer.max_steps
            if not isinstance(error, ConfigurationError) or config.lora.rank != 4:
                (folder / ".hydra").mkdir()
                record()
            if config.lora.rank == 4:
                raise error
            summary = {"test": {"test/loss": 1.0}, "parameters": {"adapter": 1}, "final": {"val/loss": 3.0}}
            summary |= {"final_ranks": {}, "seconds": 1, "tokens_per_second": 1, "peak_memory_bytes": 1}
            (folder / "summary.json").write_text(json.dumps(summary))
            return read_summary(folder)

        monkeypatch.setattr(job, "run", run)

    return replace


def test_experiment_of_targets_is_one_run_for_each(sweep, fail):
    # The runs have rank 16, so none of them fails; they do not measure the objective, as without a test.
    fail(None)
    code, printed, said = sweep("experiment=medical_targets", "hydra.sweep.dir=s", "seed=0", "objective=val/accuracy")
    assert code == 0, said
    names = {"[query,value]", "attention", "all-linear"}
    assert {row["lora.target_modules"] for row in table("s")} == names
    assert all(name in printed for name in names)


def test_a_sweeper_is_told_the_objective_at_the_final_weights(fail, tmp_path):
    fail(None)
    for objective, value in (("val/loss", 3.0), ("val/accuracy", None)):
        (tmp_path / objective).mkdir(parents=True)
        config = dynrank.compose(["lora.rank=8", f"objective={objective}"])
        assert run_in_sweep(config, [], tmp_path / objective, lambda: None) == value


def test_run_that_is_refused_stops_no_other_and_decides_the_exit_code(sweep, fail):
    fail(ConfigurationError("no rank of 4"))
    code, _, said = sweep("sweep=rank", "lora.rank=4,8", "trainer.max_steps=null", "hydra.sweep.dir=s")
    assert (code, said.rpartition("error: ")[2]) == (2, "no rank of 4\n")
    assert "s/0: ConfigurationError: no rank of 4\n" in said
    show_sweep(Path("s"))
    assert [row["runs"] for row in table("s")] == ["1"]


def test_run_that_crashes_stops_no_other_and_is_raised_at_the_end(sweep, fail, capsys):
    fail(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        sweep("sweep=rank", "lora.rank=4,8", "hydra.sweep.dir=s")
    # The traceback stands where it happened, as Hydra raises only the first error.
    assert "s/0: RuntimeError: out of memory\nTraceback" in capsys.readouterr().err
    show_sweep(Path("s"))
    assert [(row["lora.rank"], row["runs"]) for row in table("s")] == [("4", "0"), ("8", "1")]


def test_a_sweep_that_ctrl_c_ends_has_said_how_to_get_the_table(sweep, fail):
    fail(KeyboardInterrupt())
    code, printed, _ = sweep("sweep=rank", "lora.rank=4,8", "hydra.sweep.dir=s")
    assert (code, "dynrank sweep s" in printed) == (130, True)
