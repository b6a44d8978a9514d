"""Ramp and factor as an optimizer sees them: the rate is read inside the step, from what SGD does to its parameter."""

import pytest
import torch
from torch import nn

from dynrank.driver.rates import Rates, check_groups, rate_factor
from dynrank.errors import ConfigurationError
from dynrank.schedules import How


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
def test_ramp_multiplies_the_rate_by_a_ramp_then_leaves(optimizer, steps):
    Rates(optimizer, [], steps=steps)
    expected = [0.5 * (done + 1) / (steps + 1) for done in range(steps)] + [0.5, 0.5]
    assert moves(optimizer, steps + 2) == pytest.approx(expected, rel=1e-5)  # float32 differences


def test_ramp_goes_on_where_it_was(optimizer):
    ramp = Rates(optimizer, [], steps=4, done=2)
    assert moves(optimizer, 3) == pytest.approx([0.5 * 3 / 5, 0.5 * 4 / 5, 0.5], rel=1e-5)
    assert ramp.done == 4


def test_remove_ends_the_ramp(optimizer):
    ramp = Rates(optimizer, [], steps=5)
    moves(optimizer, 1)
    ramp.remove()
    assert moves(optimizer, 1) == pytest.approx([0.5])
    assert ramp.done == 1


def test_ramp_leaves_other_hooks_running_when_it_ends(optimizer):
    Rates(optimizer, [], steps=2)
    seen = []
    optimizer.register_step_post_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    moves(optimizer, 4)
    assert seen == [0.5] * 4


def test_factor_is_of_adapters_alone_and_survives_the_ramp_and_any_schedule():
    adapter, head = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    adapter.grad, head.grad = -torch.ones(1), -torch.ones(1)
    optimizer = torch.optim.SGD([{"params": [adapter], "lr": 0.1}, {"params": [head], "lr": 1.0}])
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    Rates(optimizer, [adapter], 3.0, steps=1)
    lengths = []
    for _ in range(3):
        before = adapter.item(), head.item()
        optimizer.step()
        schedule.step()
        lengths += [adapter.item() - before[0], head.item() - before[1]]
    assert lengths == pytest.approx([0.15, 0.5, 0.3, 1.0, 0.15, 0.5], rel=1e-5)


def test_factor_is_a_number_or_keeps_the_size_of_a_step():
    assert rate_factor(How(rate_after=2.0), {"q": 16}, {"q": 4}) == 2.0
    assert rate_factor(How(rate_after="sqrt"), {"q": 16, "v": 16}, {"q": 7, "v": 1}) == pytest.approx(2.0)


def test_factor_needs_groups_of_adapters_alone():
    adapter, head = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    mixed = torch.optim.SGD([adapter, head], lr=0.1)
    check_groups(mixed, [adapter], How())
    check_groups(torch.optim.SGD([{"params": [adapter]}, {"params": [head]}]), [adapter], How(rate_after=2.0))
    with pytest.raises(ConfigurationError, match=r"rate_after=2.*group 0 holds 1 other.*schedule\.rate_after"):
        check_groups(mixed, [adapter], How(rate_after=2.0))
