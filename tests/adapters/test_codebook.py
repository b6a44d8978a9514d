"""Levels are those of the papers; a group's scale is at least as good as the largest number, which QLoRA takes."""

import pytest
import torch
from bitsandbytes.functional import get_4bit_type
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrank.adapters.codebook import GROUP, bits_of, decode, encode, levels, rounded


def test_nf4_is_that_of_bitsandbytes():
    assert torch.equal(levels("nf4"), get_4bit_type("nf4", device="cpu").float())


# Max (1960), table I: the mean squared error of the best quantizer of normal numbers of variance 1.
@pytest.mark.parametrize(("bits", "error"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_levels_for_normal_numbers_have_the_error_of_max(bits, error):
    found = levels(f"normal{bits}").double()
    assert len(found) == 2**bits
    assert torch.equal(found, -found.flip(0))
    x = torch.linspace(-8, 8, 8001, dtype=torch.float64)
    density = (-x.square() / 2).exp() / (2 * torch.pi) ** 0.5
    # Levels are stored with the largest as 1.
    errors = []
    for size in torch.linspace(0.5, 4, 141, dtype=torch.float64):
        nearest = size * found[torch.bucketize(x, size * (found[1:] + found[:-1]) / 2)]
        errors.append(float(((x - nearest).square() * density).sum() * (x[1] - x[0])))
    assert min(errors) == pytest.approx(error, rel=2e-3)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 200),
    heavy=st.booleans(),
    size=st.integers(-3, 3),
    name=st.sampled_from(["nf4", "normal4", "normal3"]),
    seed=st.integers(0, 10**6),
)
def test_no_group_is_further_off_than_with_its_largest_number_as_scale(rows, width, heavy, size, name, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, width, generator=generator) * 10.0**size
    values = values**3 if heavy else values
    values[0, : GROUP // 2] = 0
    book = levels(name)
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


def test_more_bits_are_nearer_and_cost_what_is_said():
    torch.manual_seed(0)
    lora_B = torch.randn(384, 8) * torch.logspace(0, -2, 8)
    lora_A = torch.randn(8, 384)
    update = lora_B.double() @ lora_A.double()
    errors = {}
    for form in ("bfloat16", "float8_e4m3fn", "nf4", "normal4", "normal3"):
        b, a = rounded(lora_B, lora_A, form)
        errors[form] = float((b.double() @ a.double() - update).norm() / update.norm())
    assert errors["bfloat16"] < 0.01 < errors["float8_e4m3fn"] < 0.06 < errors["nf4"] < 0.13 < errors["normal3"] < 0.26
    assert errors["normal4"] < 0.13
    share = {form: bits_of(lora_B, lora_A, form) / 16 / (lora_A.numel() + lora_B.numel()) for form in errors}
    scales = 1 / GROUP
    assert share == {
        "bfloat16": 1,
        "float8_e4m3fn": 0.5,
        "nf4": 0.25 + scales,
        "normal4": 0.25 + scales,
        "normal3": 0.1875 + scales,
    }
