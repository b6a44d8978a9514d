"""The fused op against its reference, finite differences, and what it may keep for backward."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from dynrank.kernels.dropout import draw_seed, keep_mask, keep_rate
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
    with pytest.raises(RuntimeError, match="lora_linear_backward.default but no autograd formula"):
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


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_lora_linear_saves_nothing_of_the_size_of_x_but_x(p):
    made = operands((64, D_IN))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        lora_linear(**made, scaling=SCALING, dropout=p, seed=torch.tensor(1))
    tokens = [tensor for tensor in saved if 64 in tensor.shape]
    assert sorted([*tensor.shape] for tensor in tokens) == [[64, RANK], [64, D_IN]]
    assert any(tensor.data_ptr() == made["x"].data_ptr() for tensor in tokens)  # x itself, not a copy
    rest = sum(tensor.nbytes for tensor in saved if tensor.data_ptr() not in {t.data_ptr() for t in made.values()})
    assert rest <= 64 * RANK * 8 + 64


def products(profile):
    """Sizes of the results of all matrix products."""
    shapes = {"aten::mm": lambda a, b: (a[0], b[1]), "aten::addmm_": lambda out, *_: out}
    return {frozenset(shapes[event.name](*event.input_shapes)) for event in profile.events() if event.name in shapes}


@pytest.mark.parametrize("needs", [("x",), ("lora_A",), ("lora_B",), ("lora_A", "lora_B"), ("x", "lora_B")])
def test_lora_linear_computes_only_the_gradients_that_are_needed(needs):
    made, reference = operands((64, D_IN), requires_grad=needs), operands((64, D_IN), requires_grad=needs)
    y = lora_linear(**made, scaling=SCALING)
    with torch.profiler.profile(record_shapes=True) as profile:
        got = torch.autograd.grad(y.sum(), [made[name] for name in needs])
    y = lora_linear_reference(**reference, scaling=SCALING)
    for one, other in zip(got, torch.autograd.grad(y.sum(), [reference[name] for name in needs]), strict=True):
        assert_close(one, other)
    sizes = {"x": frozenset({64, D_IN}), "lora_A": frozenset({RANK, D_IN}), "lora_B": frozenset({RANK, D_OUT})}
    assert {name for name, size in sizes.items() if size in products(profile)} == set(needs)


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


@pytest.mark.parametrize("seed", [None, torch.tensor(1.0), torch.tensor([1]), torch.tensor(1, dtype=torch.int32)])
def test_lora_linear_refuses_what_is_no_seed(seed):
    with pytest.raises(ValueError, match="0-d int64 tensor on cpu"):
        lora_linear(**operands(), scaling=SCALING, dropout=0.1, seed=seed)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_lora_linear_refuses_what_is_no_probability(p):
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\]"):
        lora_linear(**operands(), scaling=SCALING, dropout=p, seed=torch.tensor(1))


def test_a_seed_that_changes_between_forward_and_backward_is_an_error():
    seed = torch.tensor(1)
    y = lora_linear(**operands(), scaling=SCALING, dropout=0.5, seed=seed)
    seed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def run(x, made, **options):
    """(y, gradients of x, A and B) for ``made`` with this x."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, made["lora_A"], made["lora_B"])]
    y = lora_linear(leaves[0], made["weight"], made["bias"], *leaves[1:], SCALING, **options)
    dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_lora_linear_with_dropout_is_the_formula_with_the_mask(dtype, p):
    made, seed = operands((7, D_IN), dtype), draw_seed(torch.device("cpu"))
    got = run(made["x"], made, dropout=p, seed=seed)
    keep = keep_mask(7, D_IN, p, seed).double().abs() / max(keep_rate(p), 1e-9)
    leaves = [made[name].detach().double().requires_grad_() for name in ("x", "lora_A", "lora_B")]
    y = lora_linear_reference(leaves[0], made["weight"].double(), made["bias"].double(), *leaves[1:], SCALING, keep)
    dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype).double()
    for one, other in zip(got, [y.detach(), *torch.autograd.grad(y, leaves, dy)], strict=True):
        size = max(1.0, float(other.abs().max()))
        assert_close(one.double(), other, rtol=0, atol=TOLERANCE[dtype] * size)


def test_lora_linear_gradients_with_dropout_equal_finite_differences():
    made = operands()
    assert torch.autograd.gradcheck(
        lambda x, a, b: lora_linear(x, made["weight"], None, a, b, SCALING, 0.4, torch.tensor(3)),
        (made["x"], made["lora_A"], made["lora_B"]),
    )


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
def test_the_op_keeps_the_rules_of_custom_ops(bias, p):
    made = operands(dtype=torch.float32, bias=bias)
    seed = torch.tensor(5) if p else None
    arguments = (*(made[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")), SCALING, p, seed, "torch")
    torch.library.opcheck(torch.ops.dynrank.lora_linear.default, arguments)
    x, weight, _, *rest = (value.detach() if isinstance(value, torch.Tensor) else value for value in arguments)
    for needs in ([True, True, True], [False, False, True]):
        backward = (torch.randn(4, D_OUT), x, torch.randn(4, RANK), weight, *rest, needs)
        torch.library.opcheck(torch.ops.dynrank.lora_linear_backward.default, backward)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant):
    """The seed is drawn in the part that is computed again, whose generator torch sets back."""
    made = operands((16, D_IN), torch.float32)

    def part(x, lora_A, lora_B):
        seed = draw_seed(x.device)
        return lora_linear(x, made["weight"], made["bias"], lora_A, lora_B, SCALING, 0.5, seed).square()

    results = []
    for function in (part, lambda *leaves: checkpoint(part, *leaves, use_reentrant=reentrant)):
        torch.manual_seed(4)
        leaves = [made[name].detach().clone().requires_grad_() for name in ("x", "lora_A", "lora_B")]
        y = function(*leaves)
        y.sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_twice_the_same_is_bit_equal(p):
    made = operands((16, D_IN), torch.float32)
    one, other = (run(made["x"], made, dropout=p, seed=torch.tensor(9)) for _ in range(2))
    assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_autocast_makes_it_what_the_narrow_operands_give(p):
    made = operands((16, D_IN), torch.float32)
    narrow = {name: value.detach().bfloat16() for name, value in made.items()}
    with torch.autocast("cpu", torch.bfloat16):
        got = run(made["x"], made, dropout=p, seed=torch.tensor(9))
    expected = run(narrow["x"], narrow, dropout=p, seed=torch.tensor(9))
    assert [t.dtype for t in got] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    assert all(torch.equal(one, other.to(one.dtype)) for one, other in zip(got, expected, strict=True))


def test_factors_wider_than_x_keep_their_precision():
    """A bfloat16 base with float32 adapters: the gradients of A and B are as exact as x and dy allow."""
    made = operands((64, D_IN), torch.bfloat16)
    made |= {name: made[name].detach().float() * 1.001 for name in ("lora_A", "lora_B")}
    got = run(made["x"], made)
    wide = {name: value.detach().double() for name, value in made.items()}
    expected = run(wide["x"], wide)
    assert [t.dtype for t in got] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    dy = torch.randn(64, D_OUT, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x, a, b = wide["x"], wide["lora_A"], wide["lora_B"]
    dy = dy.bfloat16().double()
    assert_close(got[2].double(), SCALING * (dy @ b).T @ x, rtol=1e-4, atol=1e-4)
    assert_close(got[3].double(), SCALING * dy.T @ (x @ a.T), rtol=1e-4, atol=1e-4)
    assert (got[0].double() - expected[0]).norm() < 2**-7 * expected[0].norm()


def test_a_tap_sees_what_passes_between_the_factors():
    made, seen = operands((7, D_IN)), []
    y = lora_linear(**made, scaling=SCALING, tap=lambda z, dz: seen.append((z, dz)))
    dy = torch.randn_like(y)
    y.backward(dy)
    ((z, dz),) = seen
    assert_close(z, made["x"] @ made["lora_A"].T)
    assert_close(dz, SCALING * dy @ made["lora_B"])
    assert not z.requires_grad
    assert not dz.requires_grad
