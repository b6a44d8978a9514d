"""What the fused layer saves is not paid for in accuracy: its errors against float64 beside those of PEFT's layer."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import dynrank

D, RANK, ALPHA, TOKENS = 128, 8, 16, 256
SETTINGS = {  # dtype of the base and of the adapters, and whether bfloat16 autocast is on
    "float32": (torch.float32, torch.float32, False),
    "bfloat16 base, float32 adapters": (torch.bfloat16, torch.float32, False),
    "bfloat16": (torch.bfloat16, torch.bfloat16, False),
    "autocast": (torch.float32, torch.float32, True),
}


def layers(base_dtype, adapter_dtype, std):
    """One LoRA layer of PEFT, of dynrank, and the same values in float64."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(D, D)).to(base_dtype)
    lora_A = (torch.randn(RANK, D) / D**0.5).to(adapter_dtype)
    lora_B = (torch.randn(D, RANK) * std).to(adapter_dtype)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"])
    made = []
    for library, dtypes in (("peft", None), ("ours", None), ("float64", torch.float64)):
        model = nn.Sequential(nn.Linear(D, D)).to(dtypes or base_dtype)
        model.load_state_dict({key: value.to(dtypes or base_dtype) for key, value in base.state_dict().items()})
        if library == "peft":
            model = get_peft_model(model, config, autocast_adapter_dtype=adapter_dtype == torch.float32)
        else:
            dynrank.add_lora(model, rank=RANK, alpha=ALPHA, target_modules=["0"], dtype=dtypes or adapter_dtype)
        with torch.no_grad():
            factors = [p for name, p in model.named_parameters() if "lora" in name]
            for factor, value in zip(factors, (lora_A, lora_B), strict=True):
                assert factor.shape == value.shape
                factor.copy_(value)
        made.append((model, factors))
    return made


def errors(setting, std):
    base_dtype, adapter_dtype, autocast = SETTINGS[setting]
    *compared, (exact, exact_factors) = layers(base_dtype, adapter_dtype, std)
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(TOKENS, D, generator=generator).to(base_dtype) for _ in range(2))
    if autocast:
        x, dy = x.bfloat16().float(), dy.bfloat16()
    wide = x.double().requires_grad_()
    y = exact(wide)
    truth = [y.detach(), *torch.autograd.grad(y, [wide, *exact_factors], dy.double())]
    found = []
    for model, factors in compared:
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(leaf)
        values = [y.detach(), *torch.autograd.grad(y, [leaf, *factors], dy.to(y.dtype))]
        found.append([float((v.double() - t).norm() / t.norm()) for v, t in zip(values, truth, strict=True)])
    return dict(zip(("y", "dx", "dA", "dB"), zip(*found, strict=True), strict=True))


@pytest.mark.parametrize("std", [1e-4, 1e-2, 5e-2])
@pytest.mark.parametrize("setting", SETTINGS)
def test_errors_are_no_larger_than_those_of_peft(setting, std):
    for name, (peft, ours) in errors(setting, std).items():
        assert ours <= 1.05 * peft, (name, ours, peft)  # 5%: two orders of the same sum
