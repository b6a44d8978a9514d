"""Interrupts anywhere in a change of rank leave all as it was or all changed; a snapshot brings all back."""

import copy

import pytest
import torch
from interrupted import interrupted
from torch import nn

import dynrank
from dynrank.change.change import Adapters
from dynrank.change.interrupts import uninterrupted
from dynrank.change.snapshot import Snapshot


def made(cls=torch.optim.AdamW, **options):
    """(net with two LoRA layers of rank 4, optimizer that has made some steps)."""
    torch.manual_seed(0)
    net = dynrank.add_lora(nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 6)), rank=4, alpha=4, target_modules=["0", "1"])
    optimizer = cls([p for p in net.parameters() if p.requires_grad], lr=1e-2, **options)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(8, 7)).square().mean().backward()
        optimizer.step()
    return net, optimizer


def contents(net, optimizer):
    """Every number of factors and optimizer state, in one vector."""
    factors = dynrank.adapter_parameters(net)
    states = [optimizer.state[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [*factors, *(value for state in states for value in state.values() if isinstance(value, torch.Tensor))]
    return torch.cat([number.detach().double().flatten() for number in numbers])


def resized(start, at=0):
    """(whether it was interrupted, what is there afterwards, lines that ran)."""
    net, optimizer = copy.deepcopy(start)
    options = {"optimizers": [optimizer], "generator": torch.Generator().manual_seed(1)}
    stopped, lines = interrupted(lambda: dynrank.resize(net, {"0": 2, "1": 6}, **options), at)
    return stopped, contents(net, optimizer), lines


def test_interrupt_at_any_line_leaves_all_as_it_was_or_all_changed():
    start = made()
    # The first change imports modules, and those lines may not count.
    resized(start)
    before = contents(*start)
    _, after, lines = resized(start)
    assert not torch.equal(before, after)
    ends = []
    for at in range(1, lines + 1):
        stopped, found, _ = resized(start, at)
        assert stopped
        known = [name for name, end in (("before", before), ("after", after)) if torch.equal(found, end)]
        ends += known or [f"between, at line {at}"]
    assert sorted(set(ends)) == ["after", "before"]
    # There is one point of no return.
    assert ends == sorted(ends, reverse=True)


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
def test_snapshot_brings_back_every_bit_as_often_as_is_asked(cls):
    net, optimizer = made(cls)
    before = contents(net, optimizer)
    snapshot = Snapshot(Adapters(net, [optimizer]))
    for rank in (2, 6):
        dynrank.resize(net, rank, optimizers=[optimizer])
        net(torch.ones(2, 7)).square().mean().backward()
        optimizer.step()
        with uninterrupted():
            snapshot.change_back().apply()
        assert torch.equal(contents(net, optimizer), before)
        assert net[0].rank == 4
