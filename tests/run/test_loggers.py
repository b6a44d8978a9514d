"""Loggers by key: each gets metrics and what the model wrote; one that is not installed says which pip install."""

import csv
import json
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dynrank import train

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries that are tried as they come


@pytest.fixture
def writing(launch, tiny_llama, tmp_path):
    """Makes a short run that writes texts, with these overrides; returns its folder."""

    def call(*overrides):
        rows = [json.dumps({"prompt": f"def f{i}(x):", "answer": f" return {i}"}) for i in range(60)]
        (tmp_path / "rows.jsonl").write_text("\n".join(rows))
        small = ["debug=smoke", "lora.rank=4", "plots=false", "trainer.max_steps=4", "hydra.run.dir=run"]
        texts = ["task.val_generate=2", "task.generate=1", "task.max_new_tokens=5"]
        data = ["task=completion", f"task.model={tiny_llama}", "data.train=rows.jsonl"]
        code, _, said = launch(train.main, *data, *small, *texts, *overrides)
        assert code == 0, said
        return tmp_path / "run"

    return call


def test_texts_stand_in_a_file_and_in_tensorboard_and_ranks_of_layers_are_no_columns(writing):
    folder = writing("logger=[csv,tensorboard]")
    with (folder / "generations.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["split"]) for row in rows] == [("4", "val")] * 2 + [("4", "test")]
    assert all(row["wanted"].strip() == f"return {row['prompt'][5:-4]}" for row in rows)
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    (event,) = events.Tensors("val/written/text_summary")
    page = event.tensor_proto.string_val[0].decode()
    assert event.step == 4
    assert all(f"    {row['prompt']}" in page for row in rows[:2])
    columns = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/loss", "val/loss", "rank/mean"} < set(columns)
    assert not [name for name in columns if "proj" in name]


def test_wandb_gets_a_table_of_texts_offline(writing, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = writing("logger=wandb")
    (run,) = (folder / "wandb").glob("offline-run-*")
    table = json.loads(next(run.rglob("val/written*.table.json")).read_text())
    assert table["columns"] == ["prompt", "wanted", "written"]
    assert len(table["data"]) == 2
    assert sys.modules["wandb"].run is None  # the next run is another one


def test_mlflow_gets_metrics_and_texts_in_one_file(writing, tmp_path):
    writing("logger=mlflow")
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("dynrank").experiment_id])
    assert run.info.status == "FINISHED"
    assert {"train/loss", "val/loss", "rank/mean", "test/loss"} < set(run.data.metrics)
    assert "**wanted**" in next(tmp_path.rglob("written_4.md")).read_text()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_logger_that_is_not_installed_says_what_to_install(launch, name, monkeypatch):
    monkeypatch.setattr("dynrank.run.loggers.find_spec", lambda _: None)
    code, _, said = launch(train.main, f"logger={name}", "debug=smoke")
    assert (code, f"pip install 'dynrank[{name}]'" in said) == (2, True)
