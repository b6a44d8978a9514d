"""The op over shapes, strides, dropout and needed gradients that hypothesis draws; and the memory that it touches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dynrank.kernels.dropout import keep_mask, keep_rate
from dynrank.kernels.lora_linear import gradients, lora_linear, lora_linear_reference, product

LEADING = ((), (0,), (1,), (37,), (2, 0), (3, 5))
LAYOUTS = {
    "contiguous": lambda make, shape: make(shape),
    "padded rows": lambda make, shape: make((*shape[:-1], shape[-1] + 3))[..., :-3],
    "every other column": lambda make, shape: make((*shape[:-1], 2 * shape[-1]))[..., ::2],
    "transposed": lambda make, shape: make(shape[::-1]).permute(*reversed(range(len(shape)))),
}


@settings(deadline=None, max_examples=150)
@given(
    leading=st.sampled_from(LEADING),
    d_in=st.integers(1, 130),
    d_out=st.integers(1, 130),
    rank=st.integers(1, 128),
    layout=st.sampled_from([*LAYOUTS]),
    bias=st.booleans(),
    p=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    needs=st.sets(st.sampled_from(["x", "lora_A", "lora_B"]), min_size=1),
)
def test_the_op_is_the_formula(leading, d_in, d_out, rank, layout, bias, p, needs):
    generator = torch.Generator().manual_seed(d_in)

    def make(shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    x, weight, lora_A, lora_B = (
        LAYOUTS[layout](make, shape) for shape in ((*leading, d_in), (d_out, d_in), (rank, d_in), (d_out, rank))
    )
    operands = {"x": x, "weight": weight, "bias": make(d_out) if bias else None, "lora_A": lora_A, "lora_B": lora_B}
    seed, rows = torch.tensor(d_out), x.numel() // d_in
    keep = keep_mask(rows, d_in, p, seed).double().abs().view(x.shape) / max(keep_rate(p), 1e-9)
    results = []
    for function, options in ((lora_linear, {"dropout": p, "seed": seed}), (lora_linear_reference, {"keep": keep})):
        for name in ("x", "lora_A", "lora_B"):
            operands[name] = operands[name].detach().requires_grad_(name in needs)
        y = function(**operands, scaling=1.5, **options)
        results.append([y, *torch.autograd.grad(y.sin().sum(), [operands[name] for name in sorted(needs)])])
    for got, expected in zip(*results, strict=True):
        assert_close(got, expected, rtol=1e-9, atol=1e-9)


class Written(TorchDispatchMode):
    """(operation, shape of its result) of everything as large as a tensor of all tokens."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() >= 64 * 48 and not func.is_view:
            self.found.append((func.overloadpacket.__name__, result.shape[1]))
        return result

    def __enter__(self):
        self.found = []
        return super().__enter__()


@pytest.mark.parametrize("bias", [True, False])
def test_each_large_tensor_is_written_twice_once_by_the_update_and_once_by_the_frozen_product(bias):
    x, weight, lora_A, lora_B = torch.randn(64, 48), torch.randn(80, 48), torch.randn(4, 48), torch.randn(80, 4)
    with Written() as forward:
        _, s = product(x, weight, torch.randn(80) if bias else None, lora_A, lora_B, 1.5, 0.0, None, "torch")
    assert forward.found == [("addmm" if bias else "mm", 80), ("addmm_", 80)]
    dy = torch.randn(64, 80)
    with Written() as backward:
        gradients(dy, x, s, lambda: weight, lora_A, lora_B, 1.5, 0.0, None, "torch", (True, True, True))
    assert backward.found == [("mm", 48), ("addmm_", 48)]


def test_accumulated_gradients_are_those_of_the_whole_batch():
    x, weight = torch.randn(8, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    lora_A, lora_B = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 6), (5, 3)))
    lora_linear(x, weight, None, lora_A, lora_B, 1.5).square().sum().backward()
    whole = [lora_A.grad.clone(), lora_B.grad.clone()]
    lora_A.grad = lora_B.grad = None
    for half in x.split(3):
        lora_linear(half, weight, None, lora_A, lora_B, 1.5).square().sum().backward()
    assert_close([lora_A.grad, lora_B.grad], whole)
