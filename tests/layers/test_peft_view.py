"""One adapter of a PEFT layer: what it remembers."""

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


def test_what_a_schedule_may_not_touch_is_kept_on_the_module(model):
    layer = layers_of(model)[0]
    assert (layer.pinned, layer.final_rank) == (False, None)
    layer.pinned = True
    layer.final_rank = 2
    again = layers_of(copy.deepcopy(model))[0]
    assert (again.pinned, again.final_rank) == (True, 2)
    assert not PeftLayer(layer.module, "other").pinned
