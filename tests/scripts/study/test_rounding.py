"""Levels are those of the papers, and more bits are nearer."""

import pytest
import torch
from rounding import bits_of, levels, rounded

from dynrank.adapters.codebook import GROUP


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
