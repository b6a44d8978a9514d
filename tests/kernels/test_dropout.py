"""Dropout by seeds: against numpy's generator, what chance allows, and whatever the shape and dtype."""

import math

import numpy as np
import pytest
import torch
from numpy.random import SFC64

from dynrank.kernels import dropout
from dynrank.kernels.dropout import draw_seed, keep_rate, masked, random_mask


def kept(p, seed, *shape, dtype=torch.float32):
    """Where an element of ones is kept, as bool."""
    ones = torch.ones(shape, dtype=dtype)
    return masked(ones, random_mask(ones, p, torch.tensor(seed))).bool()


@pytest.mark.parametrize("seed", [0, 5, -1, 2**63 - 1, -(2**63)])
def test_mask_is_15_bits_of_a_generator_that_starts_with_the_seed(seed):
    generator = SFC64(0)
    word = np.uint64(seed % 2**64)
    state = generator.state
    state["state"]["state"] = np.array([word, word, word, 1], dtype=np.uint64)
    generator.state = state
    # The generator's author throws the first twelve numbers away.
    bits = generator.random_raw(12 + 1050)[12:].view(np.uint16) & 0x7FFF
    assert np.array_equal(kept(0.3, seed, 60, 70).numpy().ravel(), bits < round(0.7 * 2**15))


@pytest.mark.parametrize("small", [-1, 10**6])
def test_mask_depends_on_the_row_major_index_alone(monkeypatch, small):
    monkeypatch.setattr(dropout, "SMALL", small)
    whole = kept(0.3, 5, 60, 101).flatten()
    sizes = {(6060,): torch.bfloat16, (7, 3): torch.float64, (2, 3, 5): torch.float16, (0, 4): None}
    for shape, dtype in sizes.items():
        some = kept(0.3, 5, *shape, dtype=dtype).flatten()
        assert torch.equal(some, whole[: len(some)])
    flipped = torch.ones(101, 60).mT
    assert torch.equal(masked(flipped, random_mask(flipped, 0.3, torch.tensor(5))).bool().flatten(), whole)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_share_kept_and_independence_of_seeds_and_neighbours(p):
    one, other = (kept(p, seed, 1024, 1024).flatten() for seed in (7, 8))
    q = keep_rate(p)
    n = len(one)
    sigma = math.sqrt(q * (1 - q) / n)
    assert abs(one.double().mean().item() - q) < 4 * sigma
    both = math.sqrt(q**2 * (1 - q**2) / n)
    for left, right in ((one, other), (one[:-1], one[1:]), (one[:-2], one[2:]), (one[:-1024], one[1024:])):
        assert abs((left & right).double().mean().item() - q**2) < 4 * both


@pytest.mark.parametrize("small", [-1, 10**6])
def test_nothing_or_everything(monkeypatch, small):
    monkeypatch.setattr(dropout, "SMALL", small)
    assert kept(0.0, 1, 3, 5).all()
    assert not kept(1.0, 1, 3, 5).any()
    assert (keep_rate(0.0), keep_rate(1.0)) == (1.0, 0.0)


@pytest.mark.parametrize("mask", [torch.tensor([-1, 0, 0, 0], dtype=torch.int16), torch.tensor([0, 1, 1, 1]).bool()])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dropped_elements_are_zero_and_the_others_untouched(dtype, mask):
    x = torch.tensor([[1.5, -2.0, math.inf, math.nan]], dtype=dtype)
    expected = torch.tensor([[1.5, 0, 0, 0]], dtype=dtype)
    assert torch.equal(masked(x, mask), expected)
    assert x.isnan().any()
    masked(x, mask, in_place=True)
    assert torch.equal(x, expected)


def test_seeds_come_from_the_generator():
    torch.manual_seed(3)
    seeds = [draw_seed(torch.device("cpu")) for _ in range(100)]
    torch.manual_seed(3)
    assert draw_seed(torch.device("cpu")) == seeds[0]
    assert len({int(seed) for seed in seeds}) == 100
    assert {seeds[0].dtype, seeds[0].ndim} == {torch.int64, 0}
