"""Triggers on the factors, against dense SVDs."""

import pytest
import torch

from dynrank.errors import ConfigurationError
from dynrank.triggers import SubspaceStable, TailEnergy


def pair(values, seed=0, d_out=9, d_in=12):
    """(lora_B, lora_A) whose product has these singular values."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(d_out, len(values), dtype=torch.float64, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(d_in, len(values), dtype=torch.float64, generator=generator)).Q
    mix = torch.eye(len(values), dtype=torch.float64) + 0.3 * torch.randn(
        len(values), len(values), dtype=torch.float64, generator=generator
    )
    return u * torch.tensor(values, dtype=torch.float64) @ mix.inverse(), mix @ v.mT


def fresh(rank=4):
    return torch.zeros(9, rank), torch.randn(rank, 12, generator=torch.Generator().manual_seed(1))


# TailEnergy


@pytest.mark.parametrize(("rank", "tail"), [(1, 14 / 30), (3, 1 / 30), (9, 0.0)])
def test_tail_energy_is_the_share_of_the_squares_beyond_the_rank(rank, tail):
    factors = {"layer": pair([4.0, 3.0, 2.0, 1.0])}
    squares = torch.linalg.svdvals(torch.matmul(*factors["layer"]))[:4].square()
    assert float(squares[rank:].sum() / squares.sum()) == pytest.approx(tail, abs=1e-12)
    assert TailEnergy(rank=rank, share=tail + 1e-6).observe(50, factors)
    if tail:
        assert not TailEnergy(rank=rank, share=tail - 1e-6).observe(50, factors)


def test_tail_energy_is_a_mean_over_layers_that_have_an_update():
    factors = {"a": pair([1.0, 1.0]), "b": pair([1.0, 0.0], seed=1), "fresh": fresh()}  # tails 0.5 and 0
    assert TailEnergy(rank=1, share=0.26).observe(50, factors)
    assert not TailEnergy(rank=1, share=0.24).observe(50, factors)


# SubspaceStable


def turned(angle):
    """A product whose two leading right singular directions are turned out of their plane by ``angle``."""
    v = torch.eye(12, dtype=torch.float64)[:, :3].clone()
    v[:, 1] = torch.cos(torch.tensor(angle)) * v[:, 1] + torch.sin(torch.tensor(angle)) * torch.eye(12)[:, 5]
    values = torch.tensor([3.0, 2.0, 0.1], dtype=torch.float64)
    return torch.linalg.qr(torch.randn(9, 3, dtype=torch.float64)).Q * values, v.mT


@pytest.mark.parametrize("angle", [0.0, 0.3, 0.8])
def test_subspace_overlap_is_the_mean_squared_cosine_of_the_angles_between(angle):
    overlap = (1 + float(torch.cos(torch.tensor(angle))) ** 2) / 2  # one direction stays, one turns
    for limit, fires in ((overlap - 1e-3, True), (overlap + 1e-3, False)):
        if limit < 1:
            trigger = SubspaceStable(rank=2, overlap=limit)
            assert not trigger.observe(50, {"layer": turned(0.0)})  # nothing to compare with yet
            assert trigger.observe(100, {"layer": turned(angle)}) is fires


def test_subspace_compares_with_the_look_before_and_not_with_the_first():
    trigger = SubspaceStable(rank=2, overlap=0.97)
    answers = [trigger.observe(step, {"layer": turned(0.2 * step)}) for step in range(6)]
    assert answers == [False] + [True] * 5  # cos(0.2)^2 each time, though in all it turns by 57 degrees


def test_subspace_does_not_see_scale_or_the_choice_of_factors():
    trigger = SubspaceStable(rank=2, overlap=0.999)
    lora_B, lora_A = turned(0.0)
    mix = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    trigger.observe(0, {"layer": (lora_B, lora_A)})
    assert trigger.observe(1, {"layer": (5 * lora_B @ mix.inverse(), mix @ lora_A)})


def test_subspace_is_a_mean_over_layers_that_have_an_update():
    still, moving = pair([3.0, 2.0]), [pair([3.0, 2.0], seed) for seed in (1, 2)]
    dense = [torch.linalg.svd(b @ a).Vh[:2] for b, a in moving]
    overlap = float((dense[0] @ dense[1].mT).square().sum()) / 2
    for limit, fires in ((0.5 + overlap / 2 - 1e-3, True), (0.5 + overlap / 2 + 1e-3, False)):
        trigger = SubspaceStable(rank=2, overlap=limit)
        # the rows of a fresh layer do not move, which would count as settled
        trigger.observe(50, {"a": still, "b": moving[0], "fresh": fresh()})
        assert trigger.observe(100, {"a": still, "b": moving[1], "fresh": fresh()}) is fires


def test_subspace_of_another_rank_is_not_compared():
    trigger = SubspaceStable(rank=8, overlap=0.01)
    trigger.observe(50, {"layer": pair([3.0, 2.0, 1.0])})
    assert not trigger.observe(100, {"layer": pair([3.0, 2.0])})


# Both


@pytest.mark.parametrize("trigger", [TailEnergy(rank=1, share=0.99), SubspaceStable(rank=2, overlap=0.01)])
def test_trigger_never_fires_while_all_layers_are_fresh(trigger):
    assert not any(trigger.observe(step, {"a": fresh(), "b": fresh(2)}) for step in (50, 100, 150))


@pytest.mark.parametrize(("kind", "value"), [(TailEnergy, float("nan")), (SubspaceStable, float("inf"))])
def test_factor_that_is_not_finite_names_its_layer(kind, value):
    diverged = pair([2.0, 1.0])
    diverged[1][0, 0] = value
    with pytest.raises(ConfigurationError, match=r"'net\.2'.*must be finite.*optimizer\.lr"):
        kind(rank=1).observe(50, {"net.0": pair([2.0, 1.0]), "net.2": diverged})
