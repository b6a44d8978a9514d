"""The padded layout, read by the rule of programs that know no patterns: scaling = global alpha / rank of a tensor."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

import dynrank
from dynrank.errors import ConfigurationError

IDS = torch.tensor([[3, 1, 4, 1, 5]])


def gpt2():
    config = GPT2Config(
        vocab_size=20, n_embd=8, n_layer=2, n_head=2, n_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config), lambda model: model(IDS).logits


def conv():
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Flatten(), nn.Linear(96, 5), nn.Linear(5, 5))
    image = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    return net, lambda model: model(image)


CASES = {
    # adapted, rank map; scalings differ between layers, and one layer is smaller than the largest rank
    "gpt2": (gpt2, r"transformer\.wte|.*\.c_(attn|fc|proj)", {"wte": 7, r".*\.1\..*c_fc": {"rank": 1, "alpha": 9}}),
    "conv": (conv, r"0|2|3", {"0": {"rank": 6, "alpha": 2}, "3": {"rank": 4, "alpha": 0.5}}),
}


@pytest.fixture(params=CASES)
def case(request):
    """(plain float64 base, adapted float64 model, output function)."""
    torch.manual_seed(0)
    make, targets, rank_map = CASES[request.param]
    base, output = make()
    base = base.double().eval()
    model = dynrank.add_lora(
        copy.deepcopy(base), rank=3, alpha=5, target_modules=targets, rank_map=rank_map, dtype=torch.float64
    )
    for _, layer in dynrank.lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.3)
    return base, model, output


@torch.no_grad()
def apply_by_global_alpha(base, folder):
    """Add the stored updates to the weights; written anew, with nothing of dynrank's."""
    if hasattr(base, "lm_head"):
        base.lm_head.weight = nn.Parameter(base.lm_head.weight.clone())  # it was tied to the embedding, which changes
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, factor in tensors.items():
        name, _, kind = key.removeprefix("base_model.model.").rpartition(".lora_")
        if kind in ("A.weight", "embedding_A"):
            other = tensors[key.replace("_A", "_B")]
            rank = factor.shape[0]
            delta = config["lora_alpha"] / rank * other.flatten(1) @ factor.flatten(1)
            weight = base.get_submodule(name).weight
            transposed = kind == "embedding_A" or type(base.get_submodule(name)).__name__ == "Conv1D"
            weight += delta.T if transposed else delta.reshape(weight.shape)


def test_padded_adapter_is_right_by_the_global_alpha_rule(case, tmp_path):
    base, model, output = case
    dynrank.save_adapter(model, tmp_path, layout="padded")
    expected, before = output(model), output(base)
    apply_by_global_alpha(base, tmp_path)
    assert_close(output(base), expected, rtol=1e-12, atol=1e-12)
    assert (expected - before).abs().max() > 1e-2


def test_native_adapter_of_unlike_ranks_is_wrong_by_that_rule(case, tmp_path):
    base, model, output = case
    dynrank.save_adapter(model, tmp_path)
    apply_by_global_alpha(base, tmp_path)
    assert (output(base) - output(model)).abs().max() > 1e-3


def test_padded_adapter_has_one_rank_and_no_patterns(case, tmp_path):
    _, model, _ = case
    dynrank.save_adapter(model, tmp_path, layout="padded")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    assert config["r"] == max(layer.rank for _, layer in dynrank.lora_layers(model))
    for key, value in load_file(tmp_path / "adapter_model.safetensors").items():
        assert config["r"] == value.shape[0 if key.endswith(("A", "A.weight")) else 1]


def test_padded_adapter_loads_here_and_what_fills_it_up_is_cut_off_where_it_exceeds_the_layer(case, tmp_path):
    base, model, output = case
    dynrank.save_adapter(model, tmp_path, layout="padded")
    back = dynrank.load_adapter(copy.deepcopy(base), tmp_path, dtype=torch.float64)
    assert_close(output(back), output(model), rtol=1e-12, atol=1e-12)
    for _, layer in dynrank.lora_layers(back):
        assert layer.rank <= min(layer.lora_A.shape[1], layer.lora_B.shape[0])


def test_padded_adapter_of_one_scaling_keeps_its_factors_bit_for_bit(tmp_path):
    net = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
    model = dynrank.add_lora(net, rank=4, alpha=7)
    nn.init.normal_(model[0].lora_B)
    dynrank.resize(model, {"1": 2})
    dynrank.save_adapter(model, tmp_path, layout="padded")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(tensors["base_model.model.1.lora_A.weight"][:2], model[1].lora_A)
    assert tensors["base_model.model.1.lora_A.weight"][2:].eq(0).all()
    assert torch.equal(tensors["base_model.model.0.lora_B.weight"], model[0].lora_B)


def test_save_adapter_refuses_an_unknown_layout(tmp_path):
    model = dynrank.add_lora(nn.Sequential(nn.Linear(4, 4)), rank=2)
    with pytest.raises(ConfigurationError, match=r"layout must be one of \['native', 'padded'\], got 'wide'"):
        dynrank.save_adapter(model, tmp_path / "adapter", layout="wide")
    assert not (tmp_path / "adapter").exists()
