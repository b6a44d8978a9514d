"""The Triton backend on a GPU, against float64; nothing of this has run yet where no GPU was."""

import pytest
import torch

from dynrank.kernels.lora_linear import lora_linear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
M = 300
D_IN = 512
D_OUT = 384
SCALING = 1.5


def multiplied_by(p, seed, backend, dtype):
    """What dropout multiplies x by, (M, D_IN), from the op itself: ones in, 64 of their columns out at a time."""
    ones = torch.ones(M, D_IN, device="cuda", dtype=dtype)
    eye = torch.eye(D_IN, device="cuda", dtype=dtype)
    how = {"scaling": 1.0, "dropout": p, "seed": seed, "backend": backend}
    nothing = torch.zeros(64, D_IN, device="cuda", dtype=dtype)
    parts = [lora_linear(ones, nothing, None, some, eye[:64, :64], **how) for some in eye.split(64)]
    keep = torch.cat(parts, dim=1).double()
    # In 16 bits 1 / keep rate is rounded, so only the zeros of the mask are read.
    return keep if dtype == torch.float32 else (keep != 0) / (1 - p)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("rank", [8, 24, 64, 128])
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        ("torch", torch.float32, 2e-6),
        ("torch", torch.bfloat16, 1e-2),
        ("triton", torch.bfloat16, 1e-2),
        ("triton", torch.float16, 2e-3),
    ],
)
def test_the_op_is_the_formula(formula, dtype, tolerance, backend, rank, p):
    generator = torch.Generator().manual_seed(0)
    shapes = ((M, D_IN), (D_OUT, D_IN), (D_OUT,), (rank, D_IN), (D_OUT, rank))
    x, weight, bias, lora_A, lora_B = (torch.randn(s, generator=generator).to("cuda", dtype) for s in shapes)
    seed = torch.tensor(-5, device="cuda")
    dy = torch.randn(M, D_OUT, generator=generator).to("cuda", dtype)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, lora_A, lora_B)]
    y = lora_linear(leaves[0], weight, bias, *leaves[1:], SCALING, p, seed, backend=backend)
    got = [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    keep = multiplied_by(p, seed, backend, dtype)
    assert abs((keep == 0).double().mean().item() - p) < 0.01
    leaves = [tensor.double().requires_grad_() for tensor in (x, lora_A, lora_B)]
    wide = formula(leaves[0], weight.double(), bias.double(), *leaves[1:], SCALING, keep)
    for one, other in zip(got, [wide.detach(), *torch.autograd.grad(wide, leaves, dy.double())], strict=True):
        assert (one.double() - other).norm() <= tolerance * other.norm()
