"""A window opens what is needed, closes all of it, and can be resumed."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import dynrank
from dynrank.change.measuring import Grams, Needs, Window


def model():
    torch.manual_seed(0)
    net = dynrank.add_lora(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5)), rank=3, target_modules=["0", "1"])
    for _, layer in dynrank.lora_layers(net):
        nn.init.normal_(layer.lora_B)
    return net, dict(dynrank.lora_layers(net))


def steps(net, window, numbers):
    for number in numbers:
        net.zero_grad()
        net(torch.randn(4, 6, generator=torch.Generator().manual_seed(number))).square().mean().backward()
        window.end_step()


@pytest.mark.parametrize(
    "needs", [Needs(grams=True), Needs(scores=True), Needs(new_rows=2), Needs(True, True, 1), Needs()]
)
def test_window_opens_what_is_needed_and_nothing_else(needs):
    net, layers = model()
    window = Window(layers, needs, span=4, seed=1)
    opened = (window.grams is not None, window.scores is not None, window.sketch is not None)
    assert opened == (needs.grams, needs.scores, needs.new_rows > 0)
    assert bool(needs) is any(opened)
    window.close()


def test_window_counts_steps_and_leaves_no_trace_when_closed():
    net, layers = model()
    window = Window(layers, Needs(True, True, 1), span=4, seed=1)
    steps(net, window, range(3))
    assert window.steps == 3
    window.close()
    assert all(not module._forward_hooks for module in net.modules())
    Grams(layers).close()  # would be refused if the window still observed


def test_window_collects_what_its_parts_collect():
    net, layers = model()
    window = Window(layers, Needs(grams=True), span=4, seed=1)
    steps(net, window, range(3))
    window.close()
    alone = Grams(layers, 4)
    steps(net, alone, range(3))
    for name in layers:
        for mine, other in zip(window.grams.of(name, "loss"), alone.of(name, "loss"), strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("cut", [1, 2])
def test_window_goes_on_from_its_state(cut, tmp_path):
    net, layers = model()
    needs = Needs(True, True, 1)
    whole = Window(layers, needs, span=4, seed=1)
    steps(net, whole, range(3))
    whole.close()
    head = Window(layers, needs, span=4, seed=1)
    steps(net, head, range(cut))
    head.close()
    torch.save(head.state_dict(), tmp_path / "state")
    tail = Window(layers, needs, span=4, seed=1)
    tail.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    steps(net, tail, range(cut, 3))
    tail.close()
    assert tail.steps == 3
    for name in layers:
        assert_close(tail.grams.of(name, "loss"), whole.grams.of(name, "loss"), rtol=0, atol=0)
        assert torch.equal(tail.scores.of(name), whole.scores.of(name))
        assert torch.equal(tail.sketch.of(name), whole.sketch.of(name))
