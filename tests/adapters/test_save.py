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


def test_files_of_equal_adapters_are_equal_and_as_readable_as_any_other(zoo, tmp_path):
    # An older adapter is replaced.
    zoo.saved(tmp_path / "1", "llama", rank=2)
    umask = os.umask(0o022)
    try:
        copies = [content(zoo.saved(tmp_path / str(index), "llama")) for index in range(3)]
        dynrank.save_adapter(zoo.by_peft("llama", tmp_path / "theirs"), tmp_path / "wrapped")
    finally:
        os.umask(umask)
    assert all(found == copies[0] for found in copies)
    files = [*(tmp_path / "0").iterdir(), *(tmp_path / "wrapped").iterdir()]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o644}


@pytest.mark.usefixtures("full_disk")
def test_save_to_a_full_disk_names_the_folder_and_leaves_the_old_adapter_whole(tmp_path):
    small, large = (dynrank.add_lora(nn.Sequential(nn.Linear(300, 300)), rank=rank) for rank in (1, 4))
    dynrank.save_adapter(small, tmp_path / "mine")
    old = content(tmp_path / "mine")
    for folder in ("mine", "new"):
        with pytest.raises(OSError, match=f"too large.*{folder}") as caught:
            dynrank.save_adapter(large, tmp_path / folder)
        assert caught.value.errno == errno.EFBIG
    assert (content(tmp_path / "mine"), content(tmp_path / "new")) == (old, {})


@pytest.mark.parametrize("place", ["layer", "head"])
def test_save_refuses_numbers_that_are_not_finite(place, zoo, tmp_path):
    model = zoo.adapted("bert")
    layer = model.bert.encoder.layer[1].attention.self.query
    if place == "layer":
        layer.lora_B.data = layer.lora_B.data.double().fill_(1e300)
    else:
        model.classifier.bias.data[0] = float("inf")
    for dtype in (None, torch.float8_e4m3fn):
        with pytest.raises(ConfigurationError, match=r"(layer\.1.*query|classifier).*lr"):
            dynrank.save_adapter(model, tmp_path / "adapter", dtype=dtype)
    assert not (tmp_path / "adapter").exists()


def test_save_refuses_what_it_has_no_place_for(zoo, tmp_path):
    model = dynrank.add_lora(nn.Sequential(nn.Linear(6, 6)), rank=2)
    model.shift = nn.Parameter(torch.zeros(6))
    with pytest.raises(ConfigurationError, match="the model' has LoRA layers and a trainable parameter"):
        dynrank.save_adapter(model, tmp_path / "adapter")
    model.shift = None
    model[0].base.bias.requires_grad_(True)
    with pytest.raises(ConfigurationError, match=r"'0\.bias' and 0 other parameters of layers with LoRA are trained"):
        dynrank.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ConfigurationError, match="no LoRA layers to save"):
        dynrank.save_adapter(zoo.plain("llama"), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_weight_under_lora_that_is_trained_elsewhere_is_refused(tmp_path):
    """An embedding, to which the adapted last layer is tied: no reader would give the last layer the trained weight."""
    net = nn.Sequential(nn.Embedding(8, 6), nn.Linear(6, 8, bias=False))
    net[1].weight = net[0].weight
    model = dynrank.add_lora(net, rank=2, target_modules=["1"])
    model[0].weight.requires_grad_(True)
    with pytest.raises(ConfigurationError, match=r"'1\.weight' and 0 other parameters of layers with LoRA are trained"):
        dynrank.save_adapter(model, tmp_path)


def test_a_layer_that_peft_takes_for_a_head_is_named(zoo, tmp_path):
    model = zoo.adapted("distilbert", target_modules=["pre_classifier"])
    with pytest.warns(UserWarning, match=r"takes 'pre_classifier'.* for one of modules_to_save, \['classifier'\]"):
        dynrank.save_adapter(model, tmp_path)
    with pytest.raises(TypeError, match="modules_to_save cannot be applied"):
        PeftModel.from_pretrained(zoo.plain("distilbert"), tmp_path)
    assert_close(zoo.outputs(dynrank.load_adapter(zoo.plain("distilbert"), tmp_path)), zoo.outputs(model))


class Nested(nn.Module):
    """Two modules of which one's name ends in the other's."""

    def __init__(self, inner):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(6, 6)
        self.body = nn.ModuleDict({"a": inner()})

    def forward(self, x):
        return self.body["a"](self.a(x))


def linear():
    return nn.Linear(6, 6)


RULE = {"rank": 1, "alpha": 7}
# The name of one layer ends in that of the other. PEFT could not adapt a dropout.
ENDS = [(nn.Dropout, {"target_modules": "a"}), (linear, {"target_modules": "a"})]
ENDS += [(linear, {"rank_map": {"^a": RULE}}), (linear, {"rank_map": {"body.a": RULE}})]


@pytest.mark.parametrize(("inner", "options"), ENDS)
def test_layers_whose_names_end_alike_are_told_apart_by_peft(inner, options, zoo, tmp_path):
    model = zoo.trained(dynrank.add_lora(Nested(inner), rank=3, **options))
    dynrank.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(Nested(inner), tmp_path).eval()
    adapted = {name.partition(".lora_")[0] for name, _ in theirs.base_model.model.named_parameters() if "lora_" in name}
    assert adapted == {name for name, _ in dynrank.lora_layers(model)}
    x = torch.randn(4, 6)
    assert_close(theirs(x), model(x))
