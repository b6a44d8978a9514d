"""PEFT's convolutions change their ranks in place: against the dense SVD, a linear layer, and PEFT."""

import pytest
import torch
import torch.nn.functional as F
from dense import truncation
from peft import LoraConfig, PeftModel, get_peft_model
from prodigyopt import Prodigy
from torch import nn
from torch.testing import assert_close
from trained import drive

import dynrank
from dynrank import Training, adapter_parameters
from dynrank.schedules import Stage
from dynrank.targets import Budget
from dynrank.triggers import At

CONVOLUTIONS = {1: (nn.Conv1d, F.conv1d), 2: (nn.Conv2d, F.conv2d), 3: (nn.Conv3d, F.conv3d)}
SETTINGS = LoraConfig(r=5, lora_alpha=8, target_modules=["0", "2"], init_lora_weights=False)


def wrapped(*layers):
    torch.manual_seed(0)
    return get_peft_model(nn.Sequential(*[layer() for layer in layers]), SETTINGS).double()


def update(module):
    """Of the filters by which PEFT computes; its own get_delta_weight knows no Conv3d of one pixel."""
    lora_A, lora_B = (factors["default"].weight.detach() for factors in (module.lora_A, module.lora_B))
    return module.scaling["default"] * (lora_B.flatten(1) @ lora_A.flatten(1)).view_as(module.get_base_layer().weight)


@pytest.mark.parametrize("dimensions", CONVOLUTIONS)
def test_a_cut_is_the_dense_truncation_and_loads_in_peft(dimensions, tmp_path):
    kind, convolve = CONVOLUTIONS[dimensions]
    layers = [lambda: kind(4, 6, 3, stride=2, padding=1), nn.Tanh, lambda: kind(6, 7, 1)]
    model = wrapped(*layers)
    x = torch.randn(2, 4, *[7] * dimensions, dtype=torch.float64)
    modules = [model.base_model.model[index] for index in (0, 2)]
    deltas = [update(module) for module in modules]
    names = [name for name, _ in dynrank.lora_layers(model)]
    reports = dynrank.resize(model, dict(zip(names, (2, 4), strict=True)), optimizers=())
    assert [(report.rank_before, report.rank_after) for report in reports] == [(5, 2), (5, 4)]
    y = x
    for module, delta, rank in zip(modules, deltas, (2, 4), strict=True):
        best = truncation(delta, rank)
        assert_close(update(module), best)
        base = module.get_base_layer()
        y = convolve(y if module is modules[0] else y.tanh(), base.weight + best, base.bias, base.stride, base.padding)
    with torch.no_grad():
        assert_close(model(x), y)
        model.save_pretrained(tmp_path)
        torch.manual_seed(0)
        again = PeftModel.from_pretrained(nn.Sequential(*[layer() for layer in layers]).double(), tmp_path).double()
        assert_close(again(x), model(x), rtol=0, atol=0)


OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "Prodigy": lambda parameters: Prodigy(parameters, lr=1.0),
}


def trained(optimizer, *, filters):
    """The two updates, and their ranks, after steps with a cut among them."""
    kind = (lambda a, b: nn.Conv2d(a, b, 1)) if filters else nn.Linear
    model = wrapped(lambda: kind(6, 8), nn.Tanh, lambda: kind(8, 5))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    made = OPTIMIZERS[optimizer](adapter_parameters(model))

    def loss():
        x = torch.randn(8, 9, 6, dtype=torch.float64, generator=generator)
        y = model(x.mT.unflatten(-1, (3, 3))).flatten(2).mT if filters else model(x)
        return (y - x[..., :5].sin()).square().mean()

    stage = Stage(At(step=12), Budget(share=0.5))
    drive(stage, Training(model, [made]), 20, loss)
    layers = [model.base_model.model[index] for index in (0, 2)]
    return [update(layer).flatten(1) for layer in layers], [layer.r for layer in layers]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_convolution_of_one_pixel_trains_as_the_linear_layer_that_it_is(optimizer):
    """Its importance is the same, and its optimizer's state is carried to the same numbers."""
    updates, ranks = trained(optimizer, filters=True)
    expected, linear_ranks = trained(optimizer, filters=False)
    assert ranks == linear_ranks
    assert sum(rank["default"] for rank in ranks) < 10
    assert_close(updates, expected, rtol=1e-6, atol=1e-8)
