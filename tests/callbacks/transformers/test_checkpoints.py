"""Checkpoints of transformers' Trainer with layers of dynrank: what they hold, for PEFT too, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small_trainer import SAVING, base, own, trainer, wrapped
from trained import ranks

import dynrank
from dynrank.callbacks import RankTrainerCallback
from dynrank.callbacks.transformers.checkpoints import prepare_checkpoints
from dynrank.errors import ConfigurationError
from dynrank.schedules import early_budget

# All layers get rank 2, and importance is measured for it.
SCHEDULE = early_budget(2, lowest=2, at=0.5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder of the checkpoints of a run of dynrank's layers, its trainer)."""
    folder = tmp_path_factory.mktemp("finished")
    made = trainer(folder, own(), RankTrainerCallback(SCHEDULE), **SAVING)
    made.train()
    return folder, made


def resume(folder, checkpoint, model=None):
    made = trainer(folder, model or own(), RankTrainerCallback(SCHEDULE))
    made.train(resume_from_checkpoint=str(checkpoint))


def test_checkpoint_made_without_the_callback_is_refused(finished, tmp_path):
    file = shutil.copytree(finished[0] / "checkpoint-2", tmp_path / "checkpoint-2") / "trainer_state.json"
    content = json.loads(file.read_text())
    del content["stateful_callbacks"]["RankTrainerCallback"]
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigurationError, match="has no progress, .* of a rank schedule, so it was made without one"):
        resume(tmp_path, file.parent)


@pytest.mark.parametrize("step", [4, 8])
def test_state_is_a_few_plain_values_for_each_layer(finished, step):
    """And no text that stands for something else."""
    state = json.loads((finished[0] / f"checkpoint-{step}" / "trainer_state.json").read_text())
    text = json.dumps(state["stateful_callbacks"]["RankTrainerCallback"])
    assert not re.search(r"[\w+/]{60}", text)
    assert text.count(",") < 20 * len(dict(dynrank.lora_layers(finished[1].model)))


def test_checkpoint_goes_on_without_dynrank(assert_same, tmp_path):
    """With the steps of a run that never had a schedule; the optimizer's file also has last updates."""
    plain, model, again = wrapped(), wrapped(), wrapped()
    trainer(tmp_path, model, RankTrainerCallback(SCHEDULE), **SAVING).train()
    stored = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    assert {"exp_avg", "dynrank_last_update"} < stored[0].keys()
    trainer(tmp_path / "plain", plain, None).train()
    trainer(tmp_path / "again", again, None).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(again, plain)


def test_model_of_add_lora_is_saved_for_peft_too(finished, tmp_path):
    """In every checkpoint, and by ``save_model``; at the ranks that it has then."""
    folder, made = finished
    made.save_model(str(tmp_path / "last"))
    inputs = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = made.model.eval()(inputs).logits
        loaded = PeftModel.from_pretrained(base(), tmp_path / "last")
        torch.testing.assert_close(loaded.eval()(inputs).logits, expected)
    assert [ranks(PeftModel.from_pretrained(base(), folder / f"checkpoint-{step}")) for step in (4, 6)] == [{4}, {2}]


def test_checkpoint_lacks_the_frozen_base_and_refuses_another(finished, tmp_path):
    file = finished[0] / "checkpoint-2" / "model.safetensors"
    assert not [name for name in load_file(file) if name.endswith("base.weight")]
    other = own()
    other.model.norm.weight.data.mul_(2)
    with pytest.raises(ConfigurationError, match=r"another base: 'model\.norm\.weight'"):
        resume(tmp_path, file.parent, other)


def test_model_that_saves_itself_into_a_folder_alone_is_saved_for_peft_too(tmp_path):
    """As sentence-transformers' models do, whose Trainer passes nothing else."""

    class Plain(torch.nn.Sequential):
        def save_pretrained(self, folder):
            (Path(folder) / "whole").write_text("")

    model = dynrank.add_lora(Plain(torch.nn.Linear(4, 4)), rank=2, alpha=2)
    prepare_checkpoints(model)
    model.save_pretrained(str(tmp_path))
    assert {file.name for file in tmp_path.iterdir()} == {"whole", "adapter_config.json", "adapter_model.safetensors"}
