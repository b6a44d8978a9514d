"""Levels are those of the papers; a group's scale is at least as good as the largest number, which QLoRA takes."""

import torch
from bitsandbytes.functional import get_4bit_type
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrank.adapters.codebook import GROUP, NF4_LEVELS, decode, encode

LEVELS = torch.tensor(NF4_LEVELS)


def test_nf4_is_that_of_bitsandbytes():
    assert torch.equal(LEVELS, get_4bit_type("nf4", device="cpu").float())


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 200),
    heavy=st.booleans(),
    size=st.integers(-2, 2),
    seed=st.integers(0, 10**6),
)
def test_no_group_is_further_off_than_with_its_largest_number_as_scale(rows, width, heavy, size, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, width, generator=generator)
    # Scales are numbers of float16, so callers bring factors into its range.
    values = (values**3 if heavy else values) * 10.0**size
    values[0, : GROUP // 2] = 0
    book = LEVELS
    codes, scales = encode(values, book)
    assert (codes.dtype, scales.dtype) == (torch.uint8, torch.float16)
    assert int(codes.max()) < len(book)
    found = decode(codes, scales, book)
    assert found.shape == values.shape
    for row in range(rows):
        for start in range(0, width, GROUP):
            group = values[row, start : start + GROUP].double()
            largest = group.abs().max().half().double()
            nearest = largest * book.double()[(group[:, None] - largest * book.double()).abs().argmin(1)]
            error = float((found[row, start : start + GROUP].double() - group).norm())
            assert error <= 1.002 * float((nearest - group).norm()) + 1e-7 * float(group.norm())
