"""Dropout by a hashed counter: against numpy, and what chance allows."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrank.kernels.dropout import CPU_CHUNK, _bits_by_torch, draw_seed, keep_mask, keep_rate, masked


def reference(rows, columns, p, seed):
    """The hash in numpy's unsigned arithmetic."""
    key, second_key = np.array([seed], dtype=np.int64).view(np.uint32)
    words = np.arange((rows * columns + 1) // 2, dtype=np.uint32) ^ key
    words = (words ^ words >> np.uint32(16)) * np.uint32(0x85EBCA6B) ^ second_key
    words = (words ^ words >> np.uint32(13)) * np.uint32(0xC2B2AE35)
    words ^= (words.view(np.int32) >> 16).view(np.uint32)  # with the sign
    bits = words.view(np.uint16)[: rows * columns].reshape(rows, columns) & 0x7FFF
    return bits < round((1 - p) * 2**15)


@settings(deadline=None)
@given(st.integers(0, 9), st.integers(1, 9), st.floats(0, 1), st.integers(-(2**63), 2**63 - 1))
def test_mask_is_the_hash(rows, columns, p, seed):
    mask = keep_mask(rows, columns, p, torch.tensor(seed))
    assert mask.dtype == torch.int16
    assert np.array_equal(mask.numpy(), -reference(rows, columns, p, seed).astype(np.int16))
    # where numpy cannot write, torch computes the same
    bits = _bits_by_torch((rows * columns + 1) // 2, torch.tensor(seed), round((1 - p) * 2**15))
    assert torch.equal(bits[: rows * columns].view(rows, columns), mask)


def test_mask_does_not_depend_on_how_it_is_cut():
    rows = 2 * CPU_CHUNK // 100 + 7  # ends within a chunk
    assert np.array_equal(keep_mask(rows, 101, 0.3, torch.tensor(5)).numpy() != 0, reference(rows, 101, 0.3, 5))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_share_kept_and_independence_of_seeds_and_neighbours(p):
    n = 2**20
    one, other = (keep_mask(1024, 1024, p, torch.tensor(seed)).ne(0).flatten() for seed in (7, 8))
    q = keep_rate(p)
    sigma = math.sqrt(q * (1 - q) / n)
    assert abs(one.double().mean().item() - q) < 4 * sigma
    both = math.sqrt(q**2 * (1 - q**2) / n)
    for left, right in ((one, other), (one[:-1], one[1:]), (one[:-2], one[2:]), (one[:-1024], one[1024:])):
        assert abs((left & right).double().mean().item() - q**2) < 4 * both


def test_nothing_or_everything():
    assert keep_mask(3, 5, 0.0, torch.tensor(1)).eq(-1).all()
    assert keep_mask(3, 5, 1.0, torch.tensor(1)).eq(0).all()
    assert (keep_rate(0.0), keep_rate(1.0)) == (1.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dropped_elements_are_zero_and_the_others_untouched(dtype):
    x = torch.tensor([[1.5, -2.0, math.inf, math.nan]], dtype=dtype)
    mask = -torch.tensor([[1, 0, 0, 0]]).to(keep_mask(1, 1, 0.5, torch.tensor(1), x.itemsize).dtype)
    assert torch.equal(masked(x, mask), torch.tensor([[1.5, 0, 0, 0]], dtype=dtype))
    masked(x, mask, in_place=True)
    assert torch.equal(x, torch.tensor([[1.5, 0, 0, 0]], dtype=dtype))


def test_seeds_come_from_the_generator():
    torch.manual_seed(3)
    seeds = [draw_seed(torch.device("cpu")) for _ in range(100)]
    torch.manual_seed(3)
    assert draw_seed(torch.device("cpu")) == seeds[0]
    assert len({int(seed) for seed in seeds}) == 100
    assert {seeds[0].dtype, seeds[0].ndim} == {torch.int64, 0}
