"""Dropout by seeds: against what chance allows, and whatever the shape and dtype."""

import math

import pytest
import torch

from dynrank.kernels import torch_backend
from dynrank.kernels.lora_linear import draw_seed
from dynrank.kernels.torch_backend import NO_DROPOUT, dropout


@pytest.fixture(params=[-1, 10**9], ids=["four at a time", "one by one"])
def _way(request, monkeypatch):
    """Both ways to draw a mask, whatever the size."""
    monkeypatch.setattr(torch_backend, "SMALL", request.param)


def kept(p, seed, *shape, dtype=torch.float32):
    """Where an element is kept."""
    return ~dropout(torch.ones(shape, dtype=dtype), p, torch.tensor(seed)).mask


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("seed", [5, -1, 2**63 - 1, -(2**63)])
def test_mask_depends_on_the_row_major_index_alone(seed):
    whole = kept(0.3, seed, 60, 101).flatten()
    sizes = {(6060,): torch.bfloat16, (7, 3): torch.float64, (2, 3, 5): torch.float16, (0, 4): torch.float32}
    for shape, dtype in sizes.items():
        some = kept(0.3, seed, *shape, dtype=dtype).flatten()
        assert torch.equal(some, whole[: len(some)])
    flipped = dropout(torch.ones(101, 60).mT, 0.3, torch.tensor(seed)).mask
    assert torch.equal(~flipped.flatten(), whole)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_share_kept_and_independence_of_seeds_and_neighbours(p):
    one, other = (kept(p, seed, 1024, 1024).flatten() for seed in (7, 8))
    q = 1 / dropout(torch.ones(1), p, torch.tensor(7)).rescale
    assert abs(q - (1 - p)) <= 2**-17
    n = len(one)
    sigma = math.sqrt(q * (1 - q) / n)
    assert abs(one.double().mean().item() - q) < 4 * sigma
    both = math.sqrt(q**2 * (1 - q**2) / n)
    for left, right in ((one, other), (one[:-1], one[1:]), (one[:-2], one[2:]), (one[:-1024], one[1024:])):
        assert abs((left & right).double().mean().item() - q**2) < 4 * both


@pytest.mark.usefixtures("_way")
def test_nothing_or_everything():
    assert dropout(torch.ones(1), 1e-6, torch.tensor(1)) is dropout(torch.ones(1), 0.5, None) is NO_DROPOUT
    assert not kept(1.0, 1, 300, 500).any()
    assert dropout(torch.ones(1), 1.0, torch.tensor(1)).rescale == 0
    assert 0 < (~kept(2**-16, 1, 1000, 1000)).sum() < 60
    assert 0 < kept(1 - 2**-16, 1, 1000, 1000).sum() < 60


def test_seeds_come_from_the_generator():
    torch.manual_seed(3)
    seeds = [draw_seed(torch.device("cpu")) for _ in range(100)]
    torch.manual_seed(3)
    assert draw_seed(torch.device("cpu")) == seeds[0]
    assert len({int(seed) for seed in seeds}) == 100
    assert {seeds[0].dtype, seeds[0].ndim} == {torch.int64, 0}
