"""A whole run of the default task in miniature: the files it leaves, and that they say the same."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from tables import rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dynrank
from dynrank.app import train
from dynrank.app.runs.job import build
from dynrank.errors import ConfigurationError

FILES = [
    *("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "rank_history.csv", "metrics.csv"),
    *("checkpoints/last.ckpt", "summary.json", ".hydra/config.yaml", "report.html"),
    *("plots/loss.png", "plots/quality.png", "plots/ranks.png", "plots/spectra.png"),
]


def test_a_run_leaves_its_files_with_the_fields_of_the_contract_and_prints_its_change_and_results(smoke_run):
    folder, printed = smoke_run
    assert [name for name in FILES if not (folder / name).stat().st_size] == []
    assert not list(folder.rglob("*.part"))
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["test"]) == {"test/loss", "test/accuracy", "test/macro_f1"}
    assert set(summary["final_ranks"].values()) == {16}
    assert min(summary[key] for key in ("seconds", "tokens_per_second", "peak_memory_bytes")) > 0
    assert summary["parameters"]["adapter"] < summary["parameters"]["trainable"] < summary["parameters"]["total"]
    history = rows(folder / "rank_history.csv")
    fields = ["step", "layer", "rank_before", "rank_after", "importance", "importance_error"]
    assert list(history[0]) == [*fields, "energy_kept", "predicted_error", "reason"]
    assert [row["layer"] for row in history] == list(summary["final_ranks"])
    # No stage of this schedule shares ranks by importance.
    known = {tuple(row[name] for name in fields[2:]) for row in history}
    assert known == {("32", "16", "", "")}
    assert all(0 < float(row["energy_kept"]) <= 1 for row in history)
    for text in ("rank change at step", "32 → 16", "attention.self.query", "675,840", "test/accuracy", "report.html"):
        assert text in printed
    # In a file, Lightning's bar has no line for a step.
    assert printed.count("Epoch") <= 1


def test_missing_package_of_pictures_says_which_extra_brings_it(monkeypatch):
    monkeypatch.setattr("dynrank.app.runs.job.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'dynrank\[plots\]', or set plots=false"):
        build(dynrank.compose(["plots=true"]))


@pytest.mark.parametrize("found_by", [["schedule=fixed", "checkpoint_every=1"], ["schedule=after_convergence"]])
def test_a_run_that_diverges_fails_and_leaves_nothing_that_is_not_finite(launch, tiny_bert, found_by):
    """By a checkpoint, or by a change of rank."""
    small = ["debug=smoke", f"task.model={tiny_bert}", "trainer.max_steps=6", "lora.rank=4", "checkpoint_every=99"]
    code, _, said = launch(train.main, *small, "plots=false", "optimizer.lr=1e30", *found_by, "hydra.run.dir=run")
    assert (code, said.count("\n")) == (1, 1), said
    kept = [*Path("run").rglob("*.ckpt")]
    good = kept[0].absolute() if kept else "none"
    assert re.search(rf"lora_.*optimizer\.lr\)?; found after step \d; the last good checkpoint is {good}", said)
    assert bool(kept) == ("checkpoint_every=1" in found_by)
    state = torch.load(kept[0])["state_dict"] if kept else {}
    assert all(value.isfinite().all() for name, value in state.items() if "lora_" in name)
    assert not Path("run/adapter").exists()


TASK = """from dynrank.app.tasks.classification import Classification

WORDS = {"fine": "good", "dull": "bad"}
ROWS = [{"text": f"{word} film {i}", "label": label} for i in range(30) for word, label in WORDS.items()]

class Reviews(Classification):
    def __init__(self, **settings):
        super().__init__(**settings | {"data": {"train": ROWS[:40], "val": ROWS[40:50], "test": ROWS[50:]}})
"""


# Libraries are tried as they come, with their warnings.
@pytest.mark.filterwarnings("ignore")
def test_own_task_runs_from_a_users_config_with_relative_paths_and_every_logger(
    launch, tmp_path, tiny_bert, monkeypatch
):
    (tmp_path / "my_tasks.py").write_text(TASK)
    (tmp_path / "mine" / "task").mkdir(parents=True)
    (tmp_path / "mine" / "task" / "own.yaml").write_text("defaults: [medical_terms]\n_target_: my_tasks.Reviews\n")
    (tmp_path / "mine" / "here.yaml").write_text("defaults: [train, _self_]\n")
    (tmp_path / "ranks.yaml").write_text("rank_pattern: {query: {rank: 3, pinned: true}}\n")
    (tmp_path / "bert").symlink_to(tiny_bert)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    small = ["debug=smoke", "task.limit=16", "plots=false", "lora.rank=4", "trainer.max_steps=4"]
    own = ["task.model=bert", "rank_map.file=ranks.yaml", "hydra.run.dir=run", "logger=[csv,tensorboard,wandb,mlflow]"]
    code, _, said = launch(train.main, "-cn", "here", "--config-dir", tmp_path / "mine", "task=own", *small, *own)
    assert code == 0, said
    folder = tmp_path / "run"
    ranks = json.loads((folder / "summary.json").read_text())["final_ranks"]
    assert {rank for name, rank in ranks.items() if name.endswith("query")} == {3}
    assert json.loads((folder / "adapter" / "labels.json").read_text())["labels"] == ["bad", "good"]
    command = "$ dynrank-train --config-name here --config-dir mine task=own debug=smoke"
    assert command in (folder / "adapter" / "README.md").read_text()

    columns = {*(folder / "metrics.csv").read_text().splitlines()[0].split(",")}
    assert {"train/loss", "val/loss", "rank/mean"} < columns
    # Single layers have no columns.
    assert not [name for name in columns if "query" in name]
    assert "val/accuracy" in EventAccumulator(str(folder / "tensorboard")).Reload().Tags()["scalars"]
    # This run has ended for wandb, so the next one is another run.
    assert sys.modules["wandb"].run is None
    # mlflow loads slowly.
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("dynrank").experiment_id])
    assert run.info.status == "FINISHED"
    assert {"train/loss", "val/loss", "rank/mean", "test/loss"} < set(run.data.metrics)
