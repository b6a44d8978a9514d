"""Which backend makes the products, and the whole op through Triton's kernels (by its interpreter)."""

import pytest
import torch
from torch import nn

import dynrank
from dynrank.errors import ConfigurationError
from dynrank.kernels import torch_backend, triton_launch
from dynrank.kernels.backends import MEASURED, paying_size, products_of
from dynrank.kernels.lora_linear import lora_linear

M = 37
D_IN = 70
D_OUT = 50
SCALING = 1.5


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_auto_is_torch_whatever_the_device(backend, device):
    assert products_of(backend, torch.ones(2, 3, device=device), 8) is torch_backend


def test_auto_is_triton_from_the_size_at_which_it_was_always_faster(tmp_path):
    rows = [("A", 100, 5, 4), ("A", 200, 4, 5), ("A", 300, 5, 4), ("A", 400, 5, 4), ("B", 100, 4, 5)]
    lines = [f"{gpu},2,9,{tokens},8,0.1,1,9,{torch_us},{triton_us}" for gpu, tokens, torch_us, triton_us in rows]
    measured = tmp_path / "measured.csv"
    measured.write_text("\n".join([MEASURED.read_text().strip(), *lines]))
    sizes = {card: paying_size(card, measured) for card in ("A", "B", "not measured")}
    assert sizes == {"A": 600, "B": float("inf"), "not measured": float("inf")}


def test_what_triton_cannot_serve_is_an_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = dynrank.add_lora(nn.Sequential(nn.Linear(130, 130)), rank=129, target_modules=["0"], backend="triton")
    with pytest.raises(ConfigurationError, match=r"the rank must be at most 128 .* got 129; set backend=\"torch\""):
        model(torch.ones(1, 130))
    dynrank.resize(model, 128, optimizers=())
    with pytest.raises(ConfigurationError, match=r"x must be bfloat16 or float16 .* got float32; set backend=\"tor"):
        model(torch.ones(1, 130))
    with pytest.raises(ConfigurationError, match=r"(NVIDIA GPU .* got cpu|not installed); set backend=\"torch\""):
        model.bfloat16()(torch.ones(1, 130).bfloat16())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_the_op_by_triton_is_the_formula(formula, triton_interpreter, dtype, tolerance, p, packed):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, M, D_IN), (D_OUT, D_IN), (D_OUT,), (5, D_IN), (D_OUT, 5))
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    x, weight, bias, lora_A, lora_B = values
    # The factors are wider than x, and Triton's kernels round them to x's dtype.
    lora_A = lora_A.float()
    lora_B = lora_B.float()
    seed = torch.tensor(-5)
    dy = torch.randn(2, M, D_OUT, generator=generator).to(dtype)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, lora_A, lora_B)]
    y = lora_linear(
        leaves[0], (lambda: weight) if packed else weight, bias, *leaves[1:], SCALING, p, seed, backend="triton"
    )
    got = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    assert [t.dtype for t in got] == [dtype, dtype, torch.float32, torch.float32]

    ones = torch.ones(2 * M, D_IN, dtype=dtype)
    dropout = triton_launch.dropout(x, p, seed)
    kept = triton_launch.expand(ones[:, :1], ones[:1], 1 / dropout.rescale, None, dropout, dtype).double()
    # The mask is scaled again in float64, because 16 bits cannot hold 1 / keep rate.
    keep = kept * dropout.rescale
    assert bool((keep == 0).any()) == (p > 0)
    leaves = [tensor.to(dtype).double().requires_grad_() for tensor in (x, lora_A, lora_B)]
    wide = formula(leaves[0], weight.double(), bias.double(), *leaves[1:], SCALING, keep.view(2, M, D_IN))
    for one, other in zip(got, [wide.detach(), *torch.autograd.grad(wide, leaves, dy.double())], strict=True):
        assert (one.double() - other).norm() <= tolerance * other.norm()
