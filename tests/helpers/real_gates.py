"""Gates as what they stand for: parameters of the model, whose gradients are autograd's."""

import copy

import torch
from torch import nn
from torch.nn.utils import parametrize

import dynrank
from dynrank.linalg import stacked, truncate_product


class Gate(nn.Module):
    """Before the directions of one size of every expert."""

    def __init__(self, layer):
        super().__init__()
        self.gates, self.experts = torch.ones(layer.rank, dtype=torch.float64, requires_grad=True), layer.num_products

    def forward(self, lora_B):
        return lora_B * self.gates.repeat_interleave(self.experts).view(-1, *[1] * (lora_B.ndim - 2))


def gated(net):
    """(a copy of ``net`` in float64 with a gate before every direction, {layer: its gates})."""
    twin, gates = copy.deepcopy(net).double(), {}
    for name, layer in dynrank.lora_layers(twin):
        svd = stacked([truncate_product(b, a, layer.rank) for b, a in layer.products()])
        layer.lora_A.data, layer.lora_B.data = svd.lora_A.view_as(layer.lora_A), svd.lora_B.view_as(layer.lora_B)
        if isinstance(layer, nn.Module):
            module, attribute = layer, "lora_B"
        elif layer.of_embedding:
            module, attribute = layer.module.lora_embedding_B, "default"
        else:
            module, attribute = layer.module.lora_B["default"], "weight"
        parametrize.register_parametrization(module, attribute, Gate(layer))
        gates[name] = module.parametrizations[attribute][0].gates
    return twin, gates
