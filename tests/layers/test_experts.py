"""dynrank's own LoRA in stacked experts: against PEFT, which adds the update to the weights."""

import copy
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from trained import updated

import dynrank

KINDS = ("Mixtral", "Qwen3Moe", "DeepseekV3", "Qwen3_5Moe", "GptOss", "GraniteMoe")
EXPERTS = r".*\.experts\.(gate_up|down)_proj"
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def own(model, rank=3, **options):
    return dynrank.add_lora(model, rank=rank, alpha=6, target_modules=EXPERTS, **options)


def both(model):
    """(dynrank's layers, PEFT's) in one model, with equal factors."""
    names = ["experts.gate_up_proj", "experts.down_proj"]
    options = {"target_modules": [], "target_parameters": names}
    theirs = get_peft_model(copy.deepcopy(model), LoraConfig(r=3, lora_alpha=6, **options))
    ours = updated(own(model), 0.3)
    theirs = theirs.eval()
    for mine, other in pairs(ours, theirs):
        other.set_factors(mine.lora_A.detach().clone(), mine.lora_B.detach().clone())
    return ours, theirs


def pairs(ours, theirs):
    """Layers of the same name; PEFT's list the last of a module's parameters first."""
    others = dict(dynrank.lora_layers(theirs))
    return [(layer, others.pop(f"base_model.model.{name}")) for name, layer in dynrank.lora_layers(ours)]


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_a_fresh_layer_leaves_the_model_as_it_is_to_the_bit(kind, tiny_moe):
    for rank in (3, 8):
        assert torch.equal(own(tiny_moe(kind), rank)(IDS).logits, tiny_moe(kind)(IDS).logits)


# torch's grouped_mm takes no width of 10 in float32.
@pytest.mark.parametrize(("kind", "width"), [*((kind, 24) for kind in KINDS), ("Mixtral", 10)])
def test_output_and_gradients_are_pefts_and_stay_so_through_a_change_of_rank(kind, width, tiny_moe):
    ours, theirs = both(tiny_moe(kind, intermediate_size=width, experts_implementation="eager"))
    for rank in (3, 2):
        for model in (ours, theirs):
            dynrank.resize(model, rank)
            model(IDS).logits.square().mean().backward()
        assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)
        for layer, other in pairs(ours, theirs):
            assert layer.rank == other.rank == rank
            for mine, expected in ((layer.lora_A.grad, other.lora_A.grad), (layer.lora_B.grad, other.lora_B.grad)):
                assert_close(mine, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["DeepseekV3", "GptOss", "GraniteMoe"])
def test_merging_gives_the_plain_model_back_with_the_update_in_its_weights(kind, tiny_moe):
    model = updated(own(tiny_moe(kind)), 0.3)
    logits = model(IDS).logits
    dynrank.merge(model)
    plain = tiny_moe(kind)
    assert [(name, type(module)) for name, module in model.named_modules()] == [
        (name, type(module)) for name, module in plain.named_modules()
    ]
    assert_close(model(IDS).logits, logits, rtol=1e-5, atol=1e-5)
    assert not torch.equal(logits, plain(IDS).logits)


def test_all_linear_takes_experts_and_rank_maps_name_them(tiny_moe):
    rules = {r"experts\.down_proj": 2, r"layers\.1\..*gate_up_proj": {"rank": 5, "final_rank": 1}}
    model = dynrank.add_lora(tiny_moe("Qwen3Moe"), rank=4, rank_map=rules)
    ranks = {name: layer.rank for name, layer in dynrank.lora_layers(model) if ".experts." in name}
    start = "model.layers.{}.mlp.experts.{}_proj"
    assert ranks == {
        start.format(i, n): r for i, n, r in [(0, "gate_up", 4), (0, "down", 2), (1, "gate_up", 5), (1, "down", 2)]
    }
    assert dict(dynrank.lora_layers(model))[start.format(1, "gate_up")].final_rank == 1


def test_unregistered_experts_are_named_and_the_other_layers_train(tiny_moe):
    model = tiny_moe("Llama4")
    stacked = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 3 or "router" in name)
    share = f"{stacked / sum(p.numel() for p in model.parameters()):.0%}"
    with pytest.warns(
        UserWarning, match=rf"{share} of the model .*4 parameters .*experts.gate_up_proj' and 2 layers .*router"
    ):
        dynrank.add_lora(model, rank=2)
    names = [name for name, _ in dynrank.lora_layers(model)]
    assert any(name.endswith("shared_expert.up_proj") for name in names)
    assert not [name for name in names if re.search(r"router|\.experts\.", name)]


def test_experts_compile_in_float32(tiny_moe):
    """torch.compile knows grouped_mm in bfloat16 only."""
    layer = updated(own(tiny_moe("Mixtral")), 0.3).model.layers[0].mlp
    x = torch.randn(1, 7, 16)
    assert_close(torch.compile(layer, backend="eager")(x), layer(x))
