"""The ramp as an optimizer sees it: the rate is read inside the step, from what SGD does to its parameter."""

import pytest
import torch
from torch import nn

from dynrank.driver.rewarmup import Rewarmup


@pytest.fixture
def optimizer():
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = -torch.ones(1)
    return torch.optim.SGD([parameter], lr=0.5)


def moves(optimizer, count):
    """How far each of ``count`` steps moves the parameter, whose gradient is -1: the rate that the step used."""
    parameter = optimizer.param_groups[0]["params"][0]
    lengths = []
    for _ in range(count):
        before = parameter.item()
        optimizer.step()
        lengths.append(parameter.item() - before)
    return lengths


@pytest.mark.parametrize("steps", [1, 3])
def test_rewarmup_multiplies_the_rate_by_a_ramp_then_leaves(optimizer, steps):
    Rewarmup(optimizer, steps)
    expected = [0.5 * (done + 1) / (steps + 1) for done in range(steps)] + [0.5, 0.5]
    assert moves(optimizer, steps + 2) == pytest.approx(expected, rel=1e-5)  # float32 differences


def test_rewarmup_goes_on_where_it_was(optimizer):
    ramp = Rewarmup(optimizer, 4, done=2)
    assert moves(optimizer, 3) == pytest.approx([0.5 * 3 / 5, 0.5 * 4 / 5, 0.5], rel=1e-5)
    assert ramp.done == 4


def test_rewarmup_is_not_seen_by_the_schedule(optimizer):
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    Rewarmup(optimizer, 2)
    rates = []
    for _ in range(3):
        moves(optimizer, 1)
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step()
    assert rates == [0.5, 0.25, 0.125]


def test_rewarmup_lowers_every_group_by_its_own_rate():
    slow, fast = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    slow.grad, fast.grad = -torch.ones(1), -torch.ones(1)
    optimizer = torch.optim.SGD([{"params": [slow], "lr": 0.1}, {"params": [fast], "lr": 1.0}])
    Rewarmup(optimizer, 1)
    optimizer.step()
    assert (slow.item(), fast.item()) == pytest.approx((0.05, 0.5))
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 1.0]


def test_rewarmup_remove_ends_the_ramp(optimizer):
    ramp = Rewarmup(optimizer, 5)
    moves(optimizer, 1)
    ramp.remove()
    assert moves(optimizer, 1) == pytest.approx([0.5])
    assert ramp.done == 1


def test_rewarmup_leaves_other_hooks_running_when_it_ends(optimizer):
    Rewarmup(optimizer, 2)
    seen = []
    optimizer.register_step_post_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    moves(optimizer, 4)
    assert seen == [0.5] * 4
