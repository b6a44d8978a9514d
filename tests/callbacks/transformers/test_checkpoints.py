"""Checkpoints of transformers' Trainer with layers of dynrank: what they hold, for PEFT too, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small_trainer import (
    CUT,
    SAVING,
    SHRINK_AND_GROW,
    base,
    own,
    trainer,
)
from trained import ranks

import dynrank
from dynrank.callbacks import RankTrainerCallback
from dynrank.callbacks.transformers.checkpoints import prepare_checkpoints
from dynrank.errors import ConfigurationError


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder of the checkpoints of a run of dynrank's layers, its trainer)."""
    folder = tmp_path_factory.mktemp("finished")
    made = trainer(folder, own(), RankTrainerCallback(SHRINK_AND_GROW), **SAVING)
    made.train()
    return folder, made


def test_checkpoint_made_without_the_callback_is_refused(finished, tmp_path):
    file = shutil.copytree(finished[0] / "checkpoint-2", tmp_path / "checkpoint-2") / "trainer_state.json"
    content = json.loads(file.read_text())
    del content["stateful_callbacks"]["RankTrainerCallback"]
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigurationError, match=r"step 2 has no state of a.*resume_from_checkpoint"):
        trainer(tmp_path, own(), RankTrainerCallback(SHRINK_AND_GROW)).train(resume_from_checkpoint=str(file.parent))


def test_weight_under_lora_that_no_checkpoint_could_have_as_an_adapter_is_refused_before_training(tmp_path):
    model = own()
    made = trainer(tmp_path, model, RankTrainerCallback(SHRINK_AND_GROW))
    next(layer for _, layer in dynrank.lora_layers(model)).base.weight.requires_grad_(True)
    with pytest.raises(ConfigurationError, match=r"q_proj\.weight' and 0 other parameters of layers with LoRA are"):
        made.train()
    assert made.state.global_step == 0


def test_model_of_add_lora_is_saved_for_peft_too(finished, tmp_path):
    """In every checkpoint, and by ``save_model``; at the ranks that it has then."""
    folder, made = finished
    made.save_model(str(tmp_path / "last"))
    inputs = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = made.model.eval()(inputs).logits
        loaded = PeftModel.from_pretrained(base(), tmp_path / "last")
        torch.testing.assert_close(loaded.eval()(inputs).logits, expected)
    found = {step: PeftModel.from_pretrained(base(), folder / f"checkpoint-{step}") for step in (2, 6)}
    assert [ranks(found[step]) for step in (2, 6)] == [{4}, {2}]


def test_checkpoint_lacks_the_frozen_base_and_refuses_another(finished, tmp_path):
    file = finished[0] / "checkpoint-2" / "model.safetensors"
    assert not [name for name in load_file(file) if name.endswith("base.weight")]
    other = own()
    other.model.norm.weight.data.mul_(2)
    with pytest.raises(ConfigurationError, match=r"another base: 'model\.norm\.weight'"):
        trainer(tmp_path, other, RankTrainerCallback(CUT)).train(resume_from_checkpoint=str(file.parent))


def test_model_that_saves_itself_into_a_folder_alone_is_saved_for_peft_too(tmp_path):
    """As sentence-transformers' models do, whose Trainer passes nothing else."""

    class Plain(torch.nn.Sequential):
        def save_pretrained(self, folder):
            (Path(folder) / "whole").write_text("")

    model = dynrank.add_lora(Plain(torch.nn.Linear(4, 4)), rank=2, alpha=2)
    prepare_checkpoints(model)
    model.save_pretrained(str(tmp_path))
    assert {file.name for file in tmp_path.iterdir()} == {"whole", "adapter_config.json", "adapter_model.safetensors"}
