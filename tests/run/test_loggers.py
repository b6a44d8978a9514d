"""Loggers by key: each gets metrics and what the model wrote."""

import csv
import json
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dynrank import train

# Libraries are tried as they come, with their warnings.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_every_logger_gets_metrics_and_texts(launch, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    rows = [json.dumps({"prompt": f"def f{i}(x):", "answer": f" return {i}"}) for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    small = ["debug=smoke", "lora.rank=4", "plots=false", "trainer.max_steps=4", "hydra.run.dir=run"]
    small += ["task.val_generate=2", "task.generate=1", "task.max_new_tokens=5"]
    data = ["task=completion", f"task.model={tiny_llama}", "data.train=rows.jsonl"]
    code, _, said = launch(train.main, *data, *small, "logger=[csv,tensorboard,wandb,mlflow]")
    assert code == 0, said
    folder = tmp_path / "run"

    with (folder / "generations.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["split"]) for row in rows] == [("4", "val")] * 2 + [("4", "test")]
    assert all(row["wanted"].strip() == f"return {row['prompt'][5:-4]}" for row in rows)
    columns = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/loss", "val/loss", "rank/mean"} < set(columns)
    # Single layers have no columns.
    assert not [name for name in columns if "proj" in name]

    (event,) = EventAccumulator(str(folder / "tensorboard")).Reload().Tensors("val/written/text_summary")
    page = event.tensor_proto.string_val[0].decode()
    assert event.step == 4
    assert all(f"    {row['prompt']}" in page for row in rows[:2])

    (offline,) = (folder / "wandb").glob("offline-run-*")
    table = json.loads(next(offline.rglob("val/written*.table.json")).read_text())
    assert (table["columns"], len(table["data"])) == (["prompt", "wanted", "written"], 2)
    # This run has ended for wandb, so the next one is another run.
    assert sys.modules["wandb"].run is None

    # mlflow loads slowly.
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("dynrank").experiment_id])
    assert run.info.status == "FINISHED"
    assert {"train/loss", "val/loss", "rank/mean", "test/loss"} < set(run.data.metrics)
    assert "**wanted**" in next(tmp_path.rglob("written_4.md")).read_text()
