"""One adapter of a PEFT layer: what it reports while it is observed, against the formula, and what it remembers."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import dynrank
from dynrank.layers.peft_view import PeftLayer


def layers_of(model):
    return dict(dynrank.lora_layers(model))


class Observed(nn.Module):
    """An embedding and a linear layer under PEFT, the latter in a checkpoint if wanted."""

    def __init__(self, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 5))
        self.net = get_peft_model(inner.double(), LoraConfig(r=2, lora_alpha=3, target_modules=["0", "1"]))
        for name, parameter in self.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.3)
        self.embed, self.linear = self.net.base_model.model
        self.reentrant = reentrant

    def forward(self, ids):
        x = self.embed(ids)
        return self.linear(x) if self.reentrant is None else checkpoint(self.linear, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_observe_reports_z_and_its_gradient_once_in_each_backward(reentrant):
    model = Observed(reentrant)
    ids, weight = torch.tensor([[1, 2, 3], [4, 1, 0]]), torch.randn(5, dtype=torch.float64)
    x = model.embed(ids).detach().requires_grad_()
    y = model.linear(x)
    g = (1 - y.detach().tanh().square()) * weight
    (at_x,) = torch.autograd.grad(y, x, g)
    seen = {name: [] for name in layers_of(model)}
    stops = [layer.observe(lambda *pair, n=n: seen[n].append(pair)) for n, layer in layers_of(model).items()]
    for _ in range(2):
        (model(ids).tanh() @ weight).sum().backward()
    (embed, linear), (of_embed, of_linear) = layers_of(model).values(), seen.values()
    assert (len(of_embed), len(of_linear)) == (2, 2)
    for z, dz in of_linear:
        assert not z.requires_grad
        assert not dz.requires_grad
        assert_close(z, x.detach() @ linear.lora_A.detach().mT)
        assert_close(dz, 1.5 * g @ linear.lora_B.detach())
    for z, dz in of_embed:
        assert_close(z, embed.lora_A.detach().mT[ids])
        assert_close(dz, 1.5 * at_x @ embed.lora_B.detach())

    with pytest.raises(RuntimeError, match="observed already"):
        embed.observe(lambda *_: None)
    held = model(ids).sum()
    for stop in stops:
        stop()
    held.backward()
    model(ids).sum().backward()
    assert (len(of_embed), len(of_linear)) == (2, 2)
    assert not model.linear.lora_A["default"]._forward_hooks
    embed.observe(lambda *_: None)()


def test_observe_says_nothing_where_no_gradient_flows():
    model, seen = Observed(), []
    for layer in layers_of(model).values():
        layer.observe(lambda *pair: seen.append(pair))
    ids = torch.tensor([[1, 2]])
    with torch.no_grad():
        model(ids)
    with model.net.disable_adapter():
        model(ids)
    assert not seen
    model.linear.lora_A["default"](torch.randn(6, dtype=torch.float64)).sum().backward()
    assert [[*t.shape] for t in seen[0]] == [[2], [2]]


def test_what_a_schedule_may_not_touch_is_kept_on_the_module():
    model = Observed()
    layer = next(iter(layers_of(model).values()))
    assert (layer.pinned, layer.final_rank) == (False, None)
    layer.pinned, layer.final_rank = True, 2
    again = next(iter(layers_of(copy.deepcopy(model)).values()))
    assert (again.pinned, again.final_rank) == (True, 2)
    assert not PeftLayer(layer.module, "other").pinned
