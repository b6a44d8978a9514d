"""The factor as an optimizer sees it: the rate is read inside the step, from what SGD does to its parameter."""

import copy
from functools import partial

import bitsandbytes
import pytest
import schedulefree
import torch
from torch import nn

from dynrank.driver.rates import Rates, check_groups, rate_factor
from dynrank.errors import ConfigurationError
from dynrank.schedules import How


def test_factor_is_a_number_or_keeps_the_size_of_a_step():
    assert rate_factor(How(rate_after=2.0), {"q": 16}, {"q": 4}) == 2.0
    assert rate_factor(How(rate_after="sqrt"), {"q": 16, "v": 16}, {"q": 7, "v": 1}) == pytest.approx(2.0)


@pytest.fixture
def pair():
    """(adapter, head), each with a gradient of -1."""
    adapter, head = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    adapter.grad, head.grad = -torch.ones(1), -torch.ones(1)
    return adapter, head


@pytest.mark.parametrize("apart", [False, True])
def test_rate_factor_is_of_adapters_alone_and_survives_any_lr_schedule(pair, apart):
    adapter, head = pair
    groups = [{"params": [head]}, {"params": [adapter]}] if apart else [{"params": [head, adapter]}]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    rates, lengths = Rates(optimizer, [adapter], 3.0), []
    for step in range(3):
        if step == 2:
            rates.remove()
        before = adapter.item(), head.item()
        optimizer.step()
        schedule.step()
        lengths += [adapter.item() - before[0], head.item() - before[1]]
    assert lengths == pytest.approx([1.5, 0.5, 0.75, 0.25, 0.125, 0.125], rel=1e-5)
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(head), id(adapter)]
    assert len(optimizer.param_groups) == 1 + apart


OPTIMIZERS = {
    "AdamW": partial(torch.optim.AdamW, lr=1e-2),
    "fused AdamW": partial(torch.optim.AdamW, lr=1e-2, fused=True),
    "SGD": partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
    "Adafactor": partial(torch.optim.Adafactor, lr=1e-2),
    "8-bit AdamW": partial(bitsandbytes.optim.AdamW8bit, lr=1e-2, min_8bit_size=1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_group_ends_in_the_bits_of_a_group_for_each(name):
    def ends(groups):
        generator = torch.Generator().manual_seed(0)
        adapter, head = (nn.Parameter(torch.randn(64, 64, generator=generator)) for _ in range(2))
        optimizer = OPTIMIZERS[name](groups(adapter, head))
        Rates(optimizer, [adapter], 3.0)
        for _ in range(3):
            for parameter in (adapter, head):
                parameter.grad = torch.randn(64, 64, generator=generator)
            optimizer.step()
        return adapter, head

    two = ends(lambda adapter, head: [{"params": [adapter]}, {"params": [head]}])
    for value, expected in zip(ends(lambda adapter, head: [adapter, head]), two, strict=True):
        assert torch.equal(value, expected)


def test_checkpoint_of_a_mixed_group_has_no_rate_factor(pair):
    runs = []
    for factor in (3.0, 1.0):
        adapter, head = copy.deepcopy(pair)
        optimizer = torch.optim.SGD([head, adapter], lr=0.5, momentum=0.9)
        Rates(optimizer, [adapter], factor)

        def interrupted(optimizer=optimizer):
            runs.append(optimizer.state_dict())
            raise KeyboardInterrupt

        optimizer.step()
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(interrupted)
        runs.append(optimizer.state_dict())
    assert runs[0] == runs[1] == runs[2] == runs[3]


def test_optimizer_that_counts_in_its_groups_needs_one_of_adapters_alone(pair):
    adapter, head = pair
    mixed = schedulefree.SGDScheduleFree([adapter, head], lr=0.1)
    check_groups(mixed, [adapter], How())
    parted, how = schedulefree.SGDScheduleFree([{"params": [adapter]}, {"params": [head]}]), How(rate_after=2.0)
    check_groups(parted, [adapter], how)
    words = r"rate_after=2.*group 0, which also has 1 other.*rate_after"
    with pytest.raises(ConfigurationError, match=words):
        check_groups(mixed, [adapter], how)
