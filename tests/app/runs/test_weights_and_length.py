"""Which weights a run exports, and how long it trains on your own files."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tables import rows

import dynrank
from dynrank.app import train

pytestmark = pytest.mark.filterwarnings("ignore")

# The rate is so high that the loss rises again.
SMALL = ["plots=false", "lora.rank=4", "task.batch_size=4", "optimizer.lr=0.2", "optimizer.head_lr=0.2"]


@pytest.fixture(scope="module")
def own(tmp_path_factory, tiny_bert):
    """Overrides of a run with own files, 2 epochs of 16 steps."""
    folder = tmp_path_factory.mktemp("own")
    first = 0
    for split, count in (("train", 32), ("val", 8), ("test", 8)):
        texts = [[f"{word} of row {i}", word] for i in range(first, first + count) for word in ("good", "bad")]
        first += count
        with (folder / f"{split}.csv").open("w", newline="") as opened:
            csv.writer(opened).writerows([["text", "label"], *texts])
    files = [f"data.{split}={folder / split}.csv" for split in ("train", "val", "test")]
    return ["task=classification", *files, f"task.model={tiny_bert}", "trainer.max_epochs=2", *SMALL]


def summary(folder):
    return json.loads((Path(folder) / "summary.json").read_text())


def validations(folder):
    """{steps made: val/loss} of the run's own validations."""
    return {int(row["step"]) + 1: float(row["val/loss"]) for row in rows(Path(folder, "metrics.csv"), "val/loss")}


def test_best_weights_since_the_change_are_exported_or_the_last(launch, own):
    settings = [*own, "schedule.final_rank=2"]
    code, _, said = launch(train.main, *settings, "hydra.run.dir=whole")
    assert code == 0, said
    found = summary("whole")
    (change,) = found["changes"]
    values = {step: value for step, value in validations("whole").items() if step > change["step"] + 1}
    best = min(values, key=values.get)
    words = r"of step (\d+) of 32: the best val/loss since the last change, (\S+)$"
    step, value = re.search(words, found["weights"]).groups()
    # Own files train in epochs, and are validated four times in each.
    assert [*validations("whole")] == [4 * n for n in range(1, 9)]
    # The final metrics are measured again, with the weights that are exported.
    assert found["final"]["val/loss"] == pytest.approx(float(value), rel=1e-3)
    if int(step) in values:
        assert (int(step), found["final"]["val/loss"]) == (best, pytest.approx(values[best]))
    assert found["final"]["val/loss"] <= min(values.values()) + 1e-6

    code, _, said = launch(train.main, *settings, "hydra.run.dir=last", "export_weights=last")
    assert code == 0, said
    assert "(export_weights=last)" in summary("last")["weights"]
    state = torch.load("last/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for name, exported in load_file("last/adapter/adapter_model.safetensors").items():
        if name.endswith("lora_A.weight"):
            assert torch.equal(exported, state[name.removeprefix("base_model.").removesuffix(".weight")])


def test_a_cut_after_the_last_step_is_what_is_exported(launch, own):
    late = ["schedule.at=1.0", "schedule.final_rank=2", "lora.rank=16"]
    code, _, said = launch(train.main, *own, *late, "hydra.run.dir=run")
    assert code == 0, said
    found = summary("run")
    cut = {row["layer"]: int(row["rank_after"]) for row in rows(Path("run/rank_history.csv")) if row["step"] == "32"}
    assert cut
    assert {name: rank for name, rank in found["final_ranks"].items() if name in cut} == cut
    exported = load_file("run/adapter/adapter_model.safetensors")
    for name, rank in cut.items():
        assert len(exported[f"base_model.model.{name}.lora_A.weight"]) == rank
    # The cut model is validated once more, and there is no other since the change.
    assert found["weights"].startswith("of step 32 of 32: the best val/loss since the last change")
    assert dynrank.read_run("run").history[0].lr_factor == found["changes"][0]["lr_factor"] > 1


@pytest.mark.parametrize(
    ("overrides", "length"),
    [
        ([], (560, None, 30, None)),
        (["task=classification", "data.train=x.csv"], (-1, 3, 0.25, 1)),
        (["task=chat", "data.train=x.jsonl", "trainer.max_epochs=7"], (-1, 7, 0.25, 1)),
        (["task=classification", "data.train=x.csv", "trainer.max_steps=9"], (9, None, 30, None)),
        (["trainer.max_epochs=1", "trainer.val_check_interval=5"], (-1, 1, 5, None)),
        (["trainer.max_steps=9", "trainer.max_epochs=2"], (9, 2, 30, None)),
        (["trainer.max_steps=9", "trainer.check_val_every_n_epoch=2"], (9, None, 0.25, 2)),
        (["trainer.max_steps=9", "trainer.val_check_interval=0.5"], (9, None, 0.5, 1)),
    ],
    ids=str,
)
def test_steps_and_epochs_work_as_they_are_typed(overrides, length):
    trainer = dynrank.compose(overrides).trainer
    names = ("max_steps", "max_epochs", "val_check_interval", "check_val_every_n_epoch")
    assert tuple(trainer[name] for name in names) == length
