"""The fused op against its formula; what it keeps for backward, computes and writes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dynrank.kernels.lora_linear import lora_linear
from dynrank.kernels.torch_backend import dropout

D_IN = 6
D_OUT = 5
RANK = 3
SCALING = 1.5
FACTORS = ("x", "lora_A", "lora_B")
LAYOUTS = {
    "contiguous": lambda make, shape: make(shape),
    "padded rows": lambda make, shape: make((*shape[:-1], shape[-1] + 3))[..., :-3],
    "every other column": lambda make, shape: make((*shape[:-1], 2 * shape[-1]))[..., ::2],
    "transposed": lambda make, shape: make(shape[::-1]).permute(*reversed(range(len(shape)))),
}


class Packed:
    """A weight that is unpacked on demand, and counts how often."""

    def __init__(self, weight):
        self.weight = weight
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return self.weight.clone()


def operands(shape=(4, D_IN), dtype=torch.float64, bias=True, requires_grad=FACTORS):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": shape, "weight": (D_OUT, D_IN), "bias": (D_OUT,), "lora_A": (RANK, D_IN), "lora_B": (D_OUT, RANK)}
    made = {
        name: torch.randn(size, dtype=torch.float64, generator=generator).to(dtype) for name, size in shapes.items()
    }
    for name in requires_grad:
        made[name].requires_grad_()
    return made if bias else {**made, "bias": None}


def run(made, function=lora_linear, **options):
    """(y, gradients of x, A and B), by leaves of their own."""
    leaves = {name: made[name].detach().requires_grad_() for name in FACTORS}
    y = function(**{**made, **leaves}, scaling=SCALING, **options)
    dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), dy)]


def multiplied_by(x, p, seed):
    """What dropout multiplies x by, in float64."""
    drawn = dropout(x, p, seed)
    return 1.0 if drawn.mask is None else (~drawn.mask).double() * drawn.rescale


@settings(deadline=None, max_examples=150)
@given(
    leading=st.sampled_from([(), (0,), (1,), (37,), (2, 0), (3, 5)]),
    d_in=st.integers(1, 130),
    d_out=st.integers(1, 130),
    rank=st.integers(1, 128),
    layout=st.sampled_from([*LAYOUTS]),
    bias=st.booleans(),
    p=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    needs=st.sets(st.sampled_from(FACTORS), min_size=1),
    packed=st.booleans(),
)
def test_the_op_is_the_formula_in_every_shape_and_layout(
    formula, leading, d_in, d_out, rank, layout, bias, p, needs, packed
):
    """In float64; tests/layers/test_accuracy.py has the other dtypes."""
    generator = torch.Generator().manual_seed(d_in)

    def make(shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    shapes = {"x": (*leading, d_in), "weight": (d_out, d_in), "lora_A": (rank, d_in), "lora_B": (d_out, rank)}
    made = {name: LAYOUTS[layout](make, shape) for name, shape in shapes.items()}
    made["bias"] = make(d_out) if bias else None
    seed = torch.tensor(d_out)
    keep = multiplied_by(made["x"], p, seed)
    results = []
    for function, options in ((lora_linear, {"dropout": p, "seed": seed}), (formula, {"keep": keep})):
        for name in FACTORS:
            made[name] = made[name].detach().requires_grad_(name in needs)
        weight = Packed(made["weight"]) if packed and function is lora_linear else made["weight"]
        y = function(**{**made, "weight": weight}, scaling=1.5, **options)
        results.append([y, *torch.autograd.grad(y.sin().sum(), [made[name] for name in sorted(needs)])])
    for got, expected in zip(*results, strict=True):
        assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("needs", [FACTORS, ("lora_A", "lora_B"), ("x",)])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_second_derivatives_are_those_of_finite_differences(needs, p):
    """A gradient penalty differentiates the backward, which has saved x A^T as a constant."""
    made = operands((2, 2, D_IN), requires_grad=needs)
    seed = torch.tensor(3)

    def output(*values):
        return lora_linear(**{**made, **dict(zip(needs, values, strict=True))}, scaling=SCALING, dropout=p, seed=seed)

    assert torch.autograd.gradgradcheck(output, tuple(made[name] for name in needs))


@pytest.mark.parametrize("shape", [(4, D_IN), (2, 3, D_IN)])
def test_output_may_change_in_place_and_its_gradient_be_not_contiguous(formula, shape):
    results = []
    for function in (lora_linear, formula):
        made = operands(shape)
        y = torch.relu_(function(**made, scaling=SCALING))
        dy = torch.randn(y.shape[::-1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        results.append(torch.autograd.grad(y, [made[name] for name in FACTORS], dy.permute(*reversed(range(dy.ndim)))))
    assert_close(*results)


@pytest.mark.parametrize("needs_x", [True, False])
def test_a_packed_weight_is_unpacked_once_for_each_product_and_not_saved(needs_x):
    made = operands((7, D_IN), requires_grad=("x", "lora_A") if needs_x else ("lora_A",))
    saved = []
    packed = Packed(made["weight"])
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = lora_linear(**{**made, "weight": packed}, scaling=SCALING)
    assert packed.calls == 1
    assert not [tensor for tensor in saved if tensor.shape in ((D_OUT, D_IN), (D_IN, D_OUT))]
    y.sum().backward()
    assert packed.calls == (2 if needs_x else 1)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_x_and_the_ranks_are_saved_once_and_nothing_of_their_length_besides(p):
    made = operands((64, D_IN))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        lora_linear(**made, scaling=SCALING, dropout=p)
    long = [tensor for tensor in saved if 64 in tensor.shape]
    assert sorted([*tensor.shape] for tensor in long) == [[64, RANK], [64, D_IN]]
    own = {tensor.data_ptr() for tensor in made.values()}
    assert made["x"].data_ptr() in {tensor.data_ptr() for tensor in long}
    assert sum(tensor.nbytes for tensor in saved if tensor.data_ptr() not in own) <= 64 * RANK * 8 + 64


@pytest.mark.parametrize("needs", [("x",), ("lora_A",), ("lora_B",), ("lora_A", "lora_B"), ("x", "lora_B")])
def test_only_the_gradients_that_are_needed_are_computed(needs):
    made = operands((64, D_IN), requires_grad=needs)
    y = lora_linear(**made, scaling=SCALING)
    with torch.profiler.profile(record_shapes=True) as profile:
        torch.autograd.grad(y.sum(), [made[name] for name in needs])
    # the two inner sizes of each matrix product's operands tell the size of its result
    results = {"aten::mm": lambda a, b: (a[0], b[1]), "aten::addmm": lambda _, a, b, *scalars: (a[0], b[1])}
    made_sizes = {frozenset(results[e.name](*e.input_shapes)) for e in profile.events() if e.name in results}
    sizes = {"x": frozenset({64, D_IN}), "lora_A": frozenset({RANK, D_IN}), "lora_B": frozenset({RANK, D_OUT})}
    assert {name for name, size in sizes.items() if size in made_sizes} == set(needs)


class Written(TorchDispatchMode):
    """(operation, columns) of every result as large as a tensor of all tokens."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        large = isinstance(result, torch.Tensor) and result.numel() >= 64 * 48 and not func.is_view
        if large and name not in ("new_empty", "detach"):
            self.found.append((name, result.shape[1]))
        return result

    def __enter__(self):
        self.found = []
        return super().__enter__()


@pytest.mark.parametrize("bias", [True, False])
def test_each_large_tensor_is_written_once_by_update_and_once_by_base(bias):
    x, lora_A, lora_B = (torch.randn(s, requires_grad=True) for s in ((64, 48), (4, 48), (80, 4)))
    weight = torch.randn(80, 48)
    bias_O = torch.randn(80) if bias else None
    with Written() as forward:
        y = lora_linear(x, weight, bias_O, lora_A, lora_B, 1.5)
    assert forward.found == [("addmm", 80), ("addmm_", 80)]
    dy = torch.randn(64, 80)
    with Written() as backward:
        torch.autograd.grad(y, [x, lora_A, lora_B], dy)
    assert backward.found == [("mm", 48), ("addmm_", 48)]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        *(({name: operands()[name].detach().float()}, "dtype") for name in ("x", "weight")),
        *(
            ({name: torch.ones(shape, dtype=torch.float64)}, "must be")
            for name, shape in [("x", (4, 7)), ("lora_A", (RANK, 7)), ("lora_A", (2, D_IN)), ("lora_B", (7, RANK))]
        ),
        *(({"bias": torch.ones(size, dtype=torch.float64)}, "must be") for size in (7, 1)),
        *(({"dropout": p, "seed": torch.tensor(1)}, r"in \[0, 1\]") for p in (-0.1, 1.1, float("nan"))),
    ],
)
def test_operands_that_do_not_fit_are_refused(changed, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        lora_linear(**{**operands(), "scaling": SCALING, **changed})


@pytest.mark.parametrize("changed", ["x", "seed", "lora_A", "lora_B", "weight"])
def test_what_changes_between_forward_and_backward_is_an_error(changed):
    made = operands()
    seed = torch.tensor(1)
    y = lora_linear(**made, scaling=SCALING, dropout=0.5, seed=seed)
    with torch.no_grad():
        {**made, "seed": seed}[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_autocast_makes_it_what_the_narrow_operands_give(p, packed):
    made = operands((16, D_IN), torch.float32)
    narrow = {name: value.detach().bfloat16() for name, value in made.items()}
    with torch.autocast("cpu", torch.bfloat16):
        got = run({**made, "weight": Packed(made["weight"])} if packed else made, dropout=p, seed=torch.tensor(9))
    expected = run(narrow, dropout=p, seed=torch.tensor(9))
    assert [t.dtype for t in got] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    assert all(torch.equal(one, other.to(one.dtype)) for one, other in zip(got, expected, strict=True))
