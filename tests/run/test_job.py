"""A whole run of the default task in miniature: the files it leaves, and that they say the same."""

import csv
import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

import dynrank
from dynrank.errors import ConfigurationError
from dynrank.models.names import model_source
from dynrank.run.job import build, make_scheduler
from dynrank.run.trusted import make
from dynrank.tasks.classification import Classifier

FILES = (
    ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "rank_history.csv", "metrics.csv"]
    + ["checkpoints/last.ckpt", "summary.json", ".hydra/config.yaml"]
    + ["plots/loss.png", "plots/quality.png", "plots/ranks.png", "plots/spectra.png", "report.html"]
)


@pytest.fixture(scope="module")
def summary(smoke_run):
    return json.loads((smoke_run[0] / "summary.json").read_text())


@pytest.fixture(scope="module")
def history(smoke_run):
    with (smoke_run[0] / "rank_history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", FILES)
def test_run_leaves_the_file(smoke_run, name):
    assert (smoke_run[0] / name).stat().st_size > 0


def test_run_leaves_no_half_written_file(smoke_run):
    assert not [path for path in smoke_run[0].rglob("*") if path.suffix == ".part"]


def test_history_has_a_row_per_layer_with_the_fields_of_the_contract(history, summary):
    fields = ["step", "layer", "rank_before", "rank_after", "energy_kept", "predicted_error", "reason"]
    assert list(history[0]) == fields
    assert [row["layer"] for row in history] == list(summary["final_ranks"])
    assert {(row["rank_before"], row["rank_after"]) for row in history} == {("32", "16")}
    assert all(0 < float(row["energy_kept"]) <= 1 for row in history)


def test_summary_has_the_fields_of_the_contract(summary):
    assert set(summary["test"]) == {"test/loss", "test/accuracy", "test/macro_f1"}
    assert set(summary["final_ranks"].values()) == {16}
    assert min(summary[key] for key in ("seconds", "tokens_per_second", "peak_memory_bytes")) > 0
    assert summary["parameters"]["adapter"] < summary["parameters"]["trainable"] < summary["parameters"]["total"]


# peft 0.21 asks transformers 5.24 for a name that is on its way out
def test_adapter_gives_equal_logits_in_peft_and_here(smoke_run):
    folder, _ = smoke_run
    module = Classifier.load_from_checkpoint(folder / "checkpoints" / "last.ckpt").eval()
    source, labels = model_source("minilm"), len(module.hparams["labels"])

    def plain():
        return AutoModelForSequenceClassification.from_pretrained(source, num_labels=labels)

    ids = torch.randint(1000, 20000, (4, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module.model(input_ids=ids).logits
        peft = PeftModel.from_pretrained(plain(), folder / "adapter").eval()(input_ids=ids).logits
        ours = dynrank.load_adapter(plain(), folder / "adapter").eval()(input_ids=ids).logits
    assert torch.allclose(peft, expected, atol=1e-5, rtol=0)
    assert torch.allclose(ours, expected, atol=1e-6, rtol=0)


def test_run_prints_the_table_of_the_drop_and_the_results(smoke_run):
    _, printed = smoke_run
    for text in (
        "rank change at step",
        "32 → 16",
        "attention.self.query",
        "675,840",
        "test/accuracy",
        "final rank",
        "report.html",
    ):
        assert text in printed


@pytest.mark.parametrize(
    "target", ["os.system", "builtins.eval", "torch.hub.load", "dynrankx.y", "dynrank.run.job.os.mkdir"]
)
def test_target_outside_the_trusted_packages_is_refused(target):
    config = dynrank.compose([f"+logger.mine={{_target_: {target}}}"])
    with pytest.raises(ConfigurationError, match="_target_"):
        make(config.logger.mine, "logger.mine")


@pytest.mark.parametrize("overrides", [["~schedule._target_"], ["schedule._target_=null"]])
def test_schedule_that_makes_nothing_is_refused_and_not_taken_for_a_fixed_rank(overrides):
    with pytest.raises(ConfigurationError, match=r"set schedule\._target_"):
        make_scheduler(dynrank.compose(overrides).schedule)


def test_missing_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setattr("dynrank.run.job.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"dynrank\[plots\].*plots=false"):
        build(dynrank.compose())
