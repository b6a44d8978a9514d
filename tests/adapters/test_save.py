"""Saved adapters: two whole files of one adapter, readable by all; what PEFT reads in them is in test_peft.py."""

import errno
import os
import stat

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.testing import assert_close

import dynrank
from dynrank.errors import ConfigurationError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_save_replaces_an_older_adapter(zoo, tmp_path):
    zoo.saved(tmp_path, "llama")
    zoo.saved(tmp_path, "llama", rank=2)
    assert set(content(tmp_path)) == {CONFIG, WEIGHTS}
    assert {layer.rank for layer in dynrank.read_adapter(tmp_path).layers.values()} == {2}


def test_files_of_equal_adapters_are_equal_and_as_readable_as_any_other(zoo, tmp_path):
    umask = os.umask(0o022)
    try:
        copies = [content(zoo.saved(tmp_path / str(index), "llama")) for index in range(6)]
    finally:
        os.umask(umask)
    assert all(found == copies[0] for found in copies)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "0").iterdir()} == {0o644}


@pytest.mark.parametrize("part", ["dynrank.adapters.save.save_file", "pathlib.Path.write_text", "os.replace"])
def test_save_that_fails_leaves_the_old_adapter_whole(part, zoo, tmp_path, monkeypatch):
    zoo.saved(tmp_path, "llama")
    old = content(tmp_path)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(part, fail)
    with pytest.raises(OSError, match="No space left"):
        zoo.saved(tmp_path, "llama", rank=2)
    assert content(tmp_path) == old


@pytest.mark.usefixtures("full_disk")
def test_save_to_a_full_disk_names_the_folder_and_leaves_no_file(tmp_path):
    model = dynrank.add_lora(nn.Sequential(nn.Linear(600, 600)), rank=4, target_modules=["0"])
    with pytest.raises(OSError, match=r"too large.*new") as caught:
        dynrank.save_adapter(model, tmp_path / "new")
    assert (caught.value.errno, [path for path in tmp_path.rglob("*") if path.is_file()]) == (errno.EFBIG, [])


@pytest.mark.parametrize("place", ["layer", "head"])
def test_save_refuses_numbers_that_are_not_finite(place, zoo, tmp_path):
    model = zoo.adapted("bert")
    layer = model.bert.encoder.layer[1].attention.self.query
    if place == "layer":
        layer.lora_B.data = layer.lora_B.data.double().fill_(1e300)
    else:
        model.classifier.bias.data[0] = float("inf")
    with pytest.raises(ConfigurationError, match=r"(layer\.1.*query|classifier).*lr"):
        dynrank.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_save_refuses_what_it_has_no_place_for(zoo, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6)
            self.shift = nn.Parameter(torch.zeros(6))

    model = dynrank.add_lora(Net(), rank=2)
    model.shift.requires_grad_(True)
    with pytest.raises(ConfigurationError, match="the model' has LoRA layers and a trainable parameter"):
        dynrank.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ConfigurationError, match="no LoRA layers to save"):
        dynrank.save_adapter(zoo.plain("llama"), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


class Nested(nn.Module):
    """Two modules of which one's name ends in the other's."""

    def __init__(self, inner):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(6, 6)
        self.body = nn.ModuleDict({"a": inner()})

    def forward(self, x):
        return self.body["a"](self.a(x))


# PEFT could not adapt a dropout.
@pytest.mark.parametrize("inner", [nn.Dropout, lambda: nn.Linear(6, 6)])
def test_save_targets_no_module_whose_name_ends_in_that_of_a_layer(inner, zoo, tmp_path):
    dynrank.save_adapter(dynrank.add_lora(Nested(inner), rank=2, target_modules="a"), tmp_path)
    theirs = PeftModel.from_pretrained(Nested(inner), tmp_path)
    adapted = {name.split(".lora_")[0] for name, _ in theirs.named_parameters() if "lora_A" in name}
    assert adapted == {"base_model.model.a"}


@pytest.mark.parametrize("rule", ["^a", "body.a"])
def test_save_keeps_ranks_and_scaling_of_names_that_end_alike(rule, zoo, tmp_path):
    def make():
        return Nested(lambda: nn.Linear(6, 6))

    model = zoo.trained(dynrank.add_lora(make(), rank=3, rank_map={rule: {"rank": 1, "alpha": 7}}))
    dynrank.save_adapter(model, tmp_path)
    x = torch.randn(4, 6)
    assert_close(PeftModel.from_pretrained(make(), tmp_path).eval()(x), model(x))
