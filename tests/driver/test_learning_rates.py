"""The factor of adapters' learning rates: in each step, with any optimizer, and nowhere else.

The property over random programs, trainers and resumes is tests/oracle/seams/rates.py.
"""

import copy

import bitsandbytes
import pytest
import schedulefree
import torch
from torch import nn
from transformers import Adafactor

from dynrank.distributed.zero import ZeroOptimizer
from dynrank.driver.learning_rates import LearningRates, check_groups
from dynrank.errors import ConfigurationError
from dynrank.schedules import How


@pytest.fixture
def pair():
    """(an adapter, a head), whose gradients are one; steps go down."""
    made = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    for parameter in made:
        parameter.grad = -torch.ones(1)
    return made


OPTIMIZERS = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.1),
    "fused AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.1, fused=True),
    "8-bit AdamW": lambda groups: bitsandbytes.optim.AdamW8bit(groups, lr=0.1, min_8bit_size=1),
    "rate in a tensor": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(0.1)),
    "Adafactor": lambda groups: Adafactor(groups, lr=0.1, relative_step=False),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_mixed_group_ends_in_the_bits_of_two_groups_with_two_rates(name):
    """And is the same list in between, also in checkpoints."""
    torch.manual_seed(0)
    adapter, head = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3, 2))
    others = copy.deepcopy([adapter, head])
    mixed = OPTIMIZERS[name]([adapter, head])
    apart = OPTIMIZERS[name](
        [{"params": [others[0]], "lr": mixed.param_groups[0]["lr"] * 2.0}, {"params": [others[1]]}]
    )
    rates = LearningRates(mixed, [adapter], 2.0)
    (group,) = mixed.param_groups
    before = {**group}
    for step in range(4):
        for parameter in (adapter, head, *others):
            parameter.grad = torch.cos(torch.arange(parameter.numel()) + step).view_as(parameter)
        mixed.step()
        apart.step()
        assert mixed.param_groups == [group]
        assert all(group[key] is before[key] for key in ("lr", "params"))
    assert float(rates.used[0]) == pytest.approx(0.2)
    assert torch.equal(adapter, others[0])
    assert torch.equal(head, others[1])
    assert mixed.state_dict()["param_groups"] == OPTIMIZERS[name]([adapter, head]).state_dict()["param_groups"]


@pytest.mark.parametrize("mixed", [False, True])
def test_an_error_within_a_step_leaves_nothing(pair, mixed):
    """Neither in a checkpoint that is written then, nor in a rate that the program sets then."""
    optimizer = torch.optim.SGD(pair if mixed else pair[:1], lr=0.1)
    rates = LearningRates(optimizer, pair[:1], 2.0)
    step = optimizer._init_group

    def failing(*_):
        raise RuntimeError("no memory")

    for failed in (
        lambda: optimizer.step(failing),
        lambda: setattr(optimizer, "_init_group", failing) or optimizer.step(),
    ):
        with pytest.raises(RuntimeError, match="no memory"):
            failed()
        (stored,) = optimizer.state_dict()["param_groups"]
        assert (stored["lr"], len(stored["params"])) == (0.1, 1 + mixed)
    with pytest.raises(RuntimeError, match="no memory"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer._init_group = step
    optimizer.step()
    assert pair[0].item() == pytest.approx(1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5]
    rates.remove()
    optimizer.step()
    assert pair[0].item() == pytest.approx(1.5)


def test_two_schedules_are_refused_in_one_optimizer_that_deepspeed_steps(pair):
    """Each has a ZeroOptimizer of its own for it."""
    optimizer = torch.optim.SGD(pair, lr=0.1)
    first = LearningRates(ZeroOptimizer(optimizer, [[*pair]]), pair, 1.0)
    with pytest.raises(ConfigurationError, match="another rank schedule drives this optimizer"):
        LearningRates(ZeroOptimizer(optimizer, [[*pair]]), pair, 1.0)
    first.remove()
    LearningRates(ZeroOptimizer(optimizer, [[*pair]]), pair, 1.0)


def test_optimizer_that_counts_in_its_groups_or_computes_its_own_rate_is_refused_a_factor(pair):
    adapter, head = pair
    how = How(lr_factor=2.0)
    check_groups(schedulefree.AdamWScheduleFree([adapter]), [adapter], how)
    # The d of torch's Adafactor is a setting.
    check_groups(torch.optim.Adafactor([adapter, head]), [adapter], how)
    check_groups(Adafactor([adapter]), [adapter], How())
    check_groups(Adafactor([adapter], lr=1e-3, relative_step=False), [adapter], how)
    check_groups(Adafactor([{"params": [head]}]), [adapter], how)
    with pytest.raises(ConfigurationError, match=r"keeps state in a param group, and group 0 also has 1 other"):
        check_groups(schedulefree.AdamWScheduleFree([adapter, head]), [adapter], how)
    with pytest.raises(ConfigurationError, match=r"Adafactor computes its own; set lr_factor=1.*relative_step=False"):
        check_groups(Adafactor([adapter, head]), [adapter], How(lr_factor="sqrt"))
