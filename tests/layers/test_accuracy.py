"""What the fused layer saves is not paid for in accuracy: its errors against float64 beside those of PEFT's layer."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import dynrank
from dynrank.layers.kinds import LoRALinear

D = 128
RANK = 8
ALPHA = 16
TOKENS = 256
SETTINGS = {
    "float32": (torch.float32, torch.float32, False),
    "bfloat16 base, float32 adapters": (torch.bfloat16, torch.float32, False),
    "bfloat16": (torch.bfloat16, torch.bfloat16, False),
    "autocast": (torch.float32, torch.float32, True),
}


def layers(base_dtype, adapter_dtype, std):
    """One LoRA layer of PEFT, of dynrank, and the same values in float64."""
    torch.manual_seed(0)
    base = nn.Linear(D, D).to(base_dtype).requires_grad_(False)
    lora_A = (torch.randn(RANK, D) / D**0.5).to(adapter_dtype)
    lora_B = (torch.randn(D, RANK) * std).to(adapter_dtype)
    theirs = nn.Sequential(copy.deepcopy(base))
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"])
    theirs = get_peft_model(theirs, config, autocast_adapter_dtype=adapter_dtype == torch.float32)
    next(dynrank.lora_layers(theirs))[1].set_factors(lora_A.clone(), lora_B.clone())
    ours = LoRALinear(base, rank=RANK, scaling=ALPHA / RANK, dtype=adapter_dtype, factors=(lora_A, lora_B))
    return theirs, ours, copy.deepcopy(ours).double()


def errors(setting, std):
    """{result: relative errors of PEFT's and of dynrank's}"""
    base_dtype, adapter_dtype, autocast = SETTINGS[setting]
    *compared, exact = layers(base_dtype, adapter_dtype, std)
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(TOKENS, D, generator=generator).bfloat16().to(base_dtype) for _ in range(2))

    def results(layer, dtype, autocast=False):
        leaf = x.to(dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(leaf)
        return [y.detach(), *torch.autograd.grad(y, [leaf, *dynrank.adapter_parameters(layer)], dy.to(y.dtype))]

    truth = results(exact, torch.float64)
    found = []
    for layer in compared:
        pairs = zip(results(layer, base_dtype, autocast), truth, strict=True)
        found.append([float((value.double() - true).norm() / true.norm()) for value, true in pairs])
    return dict(zip(("y", "dx", "dA", "dB"), zip(*found, strict=True), strict=True))


@pytest.mark.parametrize("std", [1e-4, 1e-2, 5e-2])
@pytest.mark.parametrize("setting", SETTINGS)
def test_errors_are_no_larger_than_those_of_peft(setting, std):
    for name, (peft, ours) in errors(setting, std).items():
        # The 5% are for two orders of the same sum.
        assert ours <= 1.05 * peft, (name, ours, peft)
