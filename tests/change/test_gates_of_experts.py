"""Gates of stacked experts against real gates by autograd, each before the directions of one size in all experts."""

from contextlib import closing

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close

import dynrank
from dynrank.change.gates import Gates
from dynrank.linalg import stacked, truncate_product

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def own(model):
    return dynrank.add_lora(model, rank=3, alpha=6, target_modules=["gate_up_proj", "down_proj", "q_proj"])


def pefts(model):
    targets = {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}
    return get_peft_model(model, LoraConfig(r=3, lora_alpha=6, **targets))


@pytest.mark.parametrize("make", [own, pefts])
@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
def test_first_order_is_that_of_real_gates(kind, make, tiny_moe):
    model = make(tiny_moe(kind, experts_implementation="eager", attn_implementation="eager")).double()
    layers = dict(dynrank.lora_layers(model))
    for layer in layers.values():
        nn.init.normal_(layer.lora_B, std=0.3)
    with closing(Gates(model, layers, 1)) as watched:
        model(input_ids=IDS, labels=IDS).loss.backward()
        watched.end_step()
    found = watched._gradients()[0]

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    gates, values = {}, {}
    for name, layer in layers.items():
        balanced = stacked([truncate_product(b, a, layer.rank) for b, a in layer.products()])
        gates[name] = torch.ones(layer.rank, dtype=torch.float64, requires_grad=True)
        values[names[id(layer.lora_A)]] = balanced.lora_A
        # PEFT has the expert fastest
        values[names[id(layer.lora_B)]] = balanced.lora_B * gates[name].repeat_interleave(layer.experts)
    loss = torch.func.functional_call(model, values, (), {"input_ids": IDS, "labels": IDS}).loss
    expected = torch.autograd.grad(loss, [*gates.values()])
    for name, gradient in zip(gates, expected, strict=True):
        assert_close(found[name], gradient, rtol=1e-8, atol=1e-12)
    assert {layers[name].experts for name in found} == {1, 4}
