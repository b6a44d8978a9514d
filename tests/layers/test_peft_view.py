"""One adapter of a PEFT layer: who observes it, and what it remembers; tests/change has what it reports."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from trained import updated

import dynrank
from dynrank.layers.peft_view import PeftLayer

IDS = torch.tensor([[1, 2, 3], [4, 1, 0]])


def layers_of(model):
    return [layer for _, layer in dynrank.lora_layers(model)]


@pytest.fixture
def model():
    """An embedding and a linear layer under PEFT."""
    inner = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 5))
    return updated(get_peft_model(inner, LoraConfig(r=2, lora_alpha=3, target_modules=["0", "1"])))


def test_a_layer_has_one_observer_and_nothing_of_it_is_left(model):
    (embed, linear), seen = layers_of(model), []
    stops = [layer.observe(lambda *pair: seen.append(pair)) for layer in (embed, linear)]
    with pytest.raises(RuntimeError, match="observed already"):
        embed.observe(lambda *_: None)
    held = model(IDS).sum()
    for stop in stops:
        stop()
    held.backward()
    model(IDS).sum().backward()
    assert not seen
    assert not linear.module.lora_A["default"]._forward_hooks
    embed.observe(lambda *_: None)()


def test_observe_says_nothing_where_no_gradient_flows(model):
    seen = []
    for layer in layers_of(model):
        layer.observe(lambda *pair: seen.append(pair))
    with torch.no_grad():
        model(IDS)
    with model.disable_adapter():
        model(IDS)
    assert not seen
    layer.module.lora_A["default"](torch.randn(6)).sum().backward()
    assert [([*t.shape], t.requires_grad) for t in seen[0]] == [([2], False)] * 2


def test_what_a_schedule_may_not_touch_is_kept_on_the_module(model):
    layer = layers_of(model)[0]
    assert (layer.pinned, layer.final_rank) == (False, None)
    layer.pinned, layer.final_rank = True, 2
    again = layers_of(copy.deepcopy(model))[0]
    assert (again.pinned, again.final_rank) == (True, 2)
    assert not PeftLayer(layer.module, "other").pinned
