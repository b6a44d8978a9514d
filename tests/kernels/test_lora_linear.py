"""The fused op against its reference, finite differences, and what it may keep for backward."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dynrank.kernels.lora_linear import lora_linear, lora_linear_reference

D_IN, D_OUT, RANK, SCALING = 6, 5, 3, 1.5
# Unit roundoff of each dtype times about 30 sums; the reference is float64 on the same (rounded) values.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}


def operands(shape=(4, D_IN), dtype=torch.float64, bias=True, requires_grad=("x", "lora_A", "lora_B")):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": shape, "weight": (D_OUT, D_IN), "bias": (D_OUT,), "lora_A": (RANK, D_IN), "lora_B": (D_OUT, RANK)}
    made = {
        name: torch.randn(size, dtype=torch.float64, generator=generator).to(dtype) for name, size in shapes.items()
    }
    for name in requires_grad:
        made[name].requires_grad_()
    return made if bias else {**made, "bias": None}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, D_IN), (D_IN,), (2, 3, D_IN)])
def test_lora_linear_gradients_equal_finite_differences(shape, bias):
    made = operands(shape, bias=bias)
    assert torch.autograd.gradcheck(
        lambda x, a, b: lora_linear(x, made["weight"], made["bias"], a, b, SCALING),
        (made["x"], made["lora_A"], made["lora_B"]),
    )


def test_lora_linear_second_gradients_are_refused():
    """A gradient penalty must not train on a wrong number in silence."""
    made = operands((2, D_IN))
    y = lora_linear(made["x"], made["weight"], None, made["lora_A"], made["lora_B"], SCALING)
    (first,) = torch.autograd.grad(y.square().sum(), made["lora_A"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


@pytest.mark.parametrize("shape", [(4, D_IN), (2, 3, D_IN)])
def test_lora_linear_output_may_be_changed_in_place(shape):
    made = operands(shape)
    y = lora_linear(made["x"], made["weight"], None, made["lora_A"], made["lora_B"], SCALING)
    torch.relu_(y).sum().backward()
    assert made["lora_A"].grad is not None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(4, D_IN), (D_IN,), (2, 3, D_IN), (0, D_IN), (2, 0, D_IN), (1, D_IN)])
def test_lora_linear_agrees_with_the_reference(shape, dtype, bias):
    made = operands(shape, dtype, bias)
    wide = {k: v if v is None else v.detach().double().requires_grad_(v.requires_grad) for k, v in made.items()}
    y, expected = lora_linear(**made, scaling=SCALING), lora_linear_reference(**wide, scaling=SCALING)
    assert y.dtype == dtype
    assert_close(y.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    dy = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    y.backward(dy)
    expected.backward(dy.double())
    for name in ("x", "lora_A", "lora_B"):
        size = float(wide[name].grad.abs().max()) if wide[name].grad.numel() else 1.0
        tolerance = TOLERANCE[dtype] * max(1.0, size)
        assert made[name].grad.dtype == dtype
        assert_close(made[name].grad.double(), wide[name].grad, rtol=0, atol=tolerance)


def test_lora_linear_reference_is_the_dense_layer():
    made = operands()
    dense = made["weight"] + SCALING * made["lora_B"] @ made["lora_A"]
    expected = torch.nn.functional.linear(made["x"], dense, made["bias"])
    assert_close(lora_linear_reference(**made, scaling=SCALING), expected)


@pytest.mark.parametrize("view", ["transposed", "strided", "expanded"])
def test_lora_linear_takes_x_that_is_not_contiguous(view):
    made = operands()
    x = {
        "transposed": torch.randn(D_IN, 3, 2, dtype=torch.float64).permute(2, 1, 0),
        "strided": torch.randn(4, 2 * D_IN, dtype=torch.float64)[:, ::2],
        "expanded": torch.randn(1, D_IN, dtype=torch.float64).expand(4, D_IN),
    }[view]
    assert not x.is_contiguous()
    grads = []
    for function in (lora_linear, lora_linear_reference):
        leaf = x.detach().requires_grad_()
        y = function(**{**made, "x": leaf}, scaling=SCALING)
        grads.append((y, *torch.autograd.grad(y.square().sum(), [leaf, made["lora_A"], made["lora_B"]])))
    for got, expected in zip(*grads, strict=True):
        assert_close(got, expected)


def test_lora_linear_takes_a_gradient_that_is_not_contiguous():
    made = operands((2, 3, D_IN))
    dy = torch.randn(D_OUT, 3, 2, dtype=torch.float64).permute(2, 1, 0)
    names = ["x", "lora_A", "lora_B"]
    got, expected = (
        torch.autograd.grad(function(**made, scaling=SCALING), [made[name] for name in names], dy)
        for function in (lora_linear, lora_linear_reference)
    )
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other)


def test_lora_linear_saves_nothing_of_the_size_of_x_but_x():
    made = operands((64, D_IN))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        lora_linear(**made, scaling=SCALING)
    tokens = [tensor for tensor in saved if 64 in tensor.shape]
    assert sorted([*tensor.shape] for tensor in tokens) == [[64, RANK], [64, D_IN]]
    assert any(tensor.data_ptr() == made["x"].data_ptr() for tensor in tokens)  # x itself, not a copy


class Products(TorchDispatchMode):
    """Sizes of the results of all matrix products."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.sizes.append(frozenset(result.shape))
        return result


@pytest.mark.parametrize("needs", [("x",), ("lora_A",), ("lora_B",), ("lora_A", "lora_B"), ("x", "lora_B")])
def test_lora_linear_computes_only_the_gradients_that_are_needed(needs):
    made, reference = operands((64, D_IN), requires_grad=needs), operands((64, D_IN), requires_grad=needs)
    y = lora_linear(**made, scaling=SCALING)
    with Products() as products:
        got = torch.autograd.grad(y.sum(), [made[name] for name in needs])
    y = lora_linear_reference(**reference, scaling=SCALING)
    for one, other in zip(got, torch.autograd.grad(y.sum(), [reference[name] for name in needs]), strict=True):
        assert_close(one, other)
    sizes = {"x": frozenset({64, D_IN}), "lora_A": frozenset({RANK, D_IN}), "lora_B": frozenset({RANK, D_OUT})}
    assert {name for name, size in sizes.items() if size in products.sizes} == set(needs)


@pytest.mark.parametrize("name", ["x", "weight", "bias", "lora_A", "lora_B"])
def test_lora_linear_refuses_another_dtype(name):
    made = operands(dtype=torch.float32)
    made[name] = made[name].detach().double()
    with pytest.raises(ValueError, match="must have one dtype"):
        lora_linear(**made, scaling=SCALING)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("x", (4, 7)),
        ("lora_A", (RANK, 7)),
        ("lora_A", (2, D_IN)),
        ("lora_B", (7, RANK)),
        ("bias", (7,)),
        ("bias", (1,)),
    ],
)
def test_lora_linear_refuses_a_shape_that_does_not_fit(name, shape):
    made = operands()
    made[name] = torch.ones(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match="must be"):
        lora_linear(**made, scaling=SCALING)
