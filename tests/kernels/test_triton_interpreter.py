"""The Triton kernels, run by Triton's interpreter, against float64 and a mask made by numpy."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dynrank.kernels import triton_launch
from dynrank.kernels.lora_linear import lora_linear
from dynrank.kernels.triton_launch import dropout, expand, grad_A, grad_S_and_B, rank_bucket, shrink

pytestmark = pytest.mark.usefixtures("triton_interpreter")

# Norm of the error over the norm of the result: sums in float32, then one rounding to what is stored.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
OPERANDS = (torch.bfloat16, torch.float16)
LAYOUTS = {
    "contiguous": lambda make, shape: make(shape),
    "padded rows": lambda make, shape: make((shape[0], shape[1] + 3))[:, :-3],
    "transposed": lambda make, shape: make(shape[::-1]).mT,
    "every other column": lambda make, shape: make((shape[0], 2 * shape[1]))[:, ::2],
    # The gradient that `y.sum().backward()` gives has this layout.
    "one number": lambda make, shape: make((1, 1)).expand(shape),
}
cases = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    """Memory that torch hands out uninitialised is NaN, and an operation that may differ between runs is an error."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.ones(1).new_empty(1000).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def matrix(draw_seed, shape, dtype, layout="contiguous"):
    generator = torch.Generator().manual_seed(draw_seed)
    return LAYOUTS[layout](lambda stored: torch.randn(stored, generator=generator).to(dtype), shape)


def philox_4x32_10(counter, key):
    """Philox4x32-10 of four counter words and two key words (Salmon et al., 2011), by numpy in 64-bit integers."""
    words = [np.asarray(word, dtype=np.uint64) for word in counter]
    k0, k1 = key
    for _ in range(10):
        first = words[0] * np.uint64(0xD2511F53)
        second = words[2] * np.uint64(0xCD9E8D57)
        low = np.uint64(0xFFFFFFFF)
        high = np.uint64(32)
        words = [
            (second >> high) ^ words[1] ^ np.uint64(k0),
            second & low,
            (first >> high) ^ words[3] ^ np.uint64(k1),
            first & low,
        ]
        k0 = (k0 + 0x9E3779B9) % 2**32
        k1 = (k1 + 0xBB67AE85) % 2**32
    return words


def reference_mask(rows, columns, p, seed):
    """(rows, columns) of 0 and 1 / keep rate, by the definition of the mask, element for element."""
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    counter = (column // 8, row, 0 * row, 0 * row)
    words = philox_4x32_10(counter, (int(seed) % 2**32, int(seed) // 2**32 % 2**32))
    bits = np.choose(column % 8 // 2, words) >> (16 * (column % 2)).astype(np.uint64) & np.uint64(0xFFFF)
    threshold = round((1 - p) * 65536)
    kept = torch.from_numpy((bits < threshold).astype(np.float64))
    return kept * (65536 / threshold) if threshold else kept


def drawn_mask(rows, columns, drop):
    ones = torch.ones(rows, columns, dtype=torch.bfloat16)
    return expand(ones[:, :1], ones[:1], 1.0, None, drop, ones.dtype)


def drop(p, seed):
    return dropout(None, p, torch.tensor(seed))


def check(got, expected, size, dtype):
    """``size`` is the product of the absolute values: what float32 sums round, whatever then cancels."""
    assert got.dtype == dtype
    assert got.shape == expected.shape
    assert torch.isfinite(got).all()
    error = (got.double() - expected).norm()
    assert error <= TOLERANCE[dtype] * expected.norm() + 1e-7 * size.norm()


def product(left, right):
    """The product in float64, and that of the absolute values."""
    return left.double() @ right.double(), left.double().abs() @ right.double().abs()


@dataclass(frozen=True)
class Problem:
    dtype: torch.dtype
    rows: int
    d_in: int
    d_out: int
    rank: int
    p: float
    seed: int
    layout: str
    bias: bool

    def matrix(self, number, *shape):
        return matrix(number, shape, self.dtype, self.layout)

    def mask(self, columns):
        return reference_mask(self.rows, columns, self.p, self.seed)

    def drop(self):
        return drop(self.p, self.seed)


problems = st.builds(
    Problem,
    dtype=st.sampled_from(OPERANDS),
    rows=st.integers(0, 150),
    d_in=st.integers(1, 300),
    d_out=st.integers(1, 300),
    rank=st.integers(1, 128),
    p=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
    layout=st.sampled_from([*LAYOUTS]),
    bias=st.booleans(),
)


@cases
@given(problem=problems)
def test_shrink_is_the_product_with_what_dropout_leaves(problem):
    x = problem.matrix(0, problem.rows, problem.d_in)
    a = problem.matrix(1, problem.rank, problem.d_in)
    expected = product(x.double() * problem.mask(problem.d_in), a.mT)
    check(shrink(x, a, problem.drop()), *expected, problem.dtype)


@cases
@given(problem=problems, scale=st.sampled_from([1.0, 0.37, -2.0]))
def test_expand_is_the_masked_product_and_bias(problem, scale):
    s = problem.matrix(0, problem.rows, problem.rank)
    factor = problem.matrix(1, problem.rank, problem.d_out)
    bias = problem.matrix(2, 1, problem.d_out)[0] if problem.bias else None
    kept = problem.mask(problem.d_out)
    expected, size = (kept * scale * each for each in product(s, factor))
    if bias is not None:
        # The op never has dropout and a bias together, so the kernel does not rescale the bias.
        kept = kept.bool()
        expected = expected + kept * bias.double()
        size = size.abs() + bias.double().abs()
    check(expand(s, factor, scale, bias, problem.drop(), s.dtype), expected, size, problem.dtype)


@cases
@given(problem=problems, stored=st.sampled_from([torch.float32, None]))
def test_grad_A_is_the_product_with_what_dropout_leaves(problem, stored):
    ds = problem.matrix(0, problem.rows, problem.rank)
    x = problem.matrix(1, problem.rows, problem.d_in)
    expected = product(ds.mT, x.double() * problem.mask(problem.d_in))
    dtype = stored or problem.dtype
    check(grad_A(ds, x, dtype, problem.drop()), *expected, dtype)


@cases
@given(problem=problems, scaling=st.sampled_from([2, 0.37, -1.5]), stored=st.sampled_from([torch.float32, None]))
def test_grad_S_and_B_are_the_two_products(problem, scaling, stored):
    """A gradient of float32 factors is the float32 sum, not rounded to the dtype of dy."""
    dy = problem.matrix(0, problem.rows, problem.d_out)
    s = problem.matrix(1, problem.rows, problem.rank)
    b = problem.matrix(2, problem.d_out, problem.rank)
    ds, db = grad_S_and_B(dy, s, b.to(stored or b.dtype), scaling, (True, True))
    check(ds, *product(scaling * dy.double(), b), problem.dtype)
    check(db, *product(scaling * dy.double().mT, s), stored or problem.dtype)


# Known answers of Random123, the authors' library.
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_reference_is_philox(counter, key, answer):
    assert tuple(int(word) for word in philox_4x32_10(counter, key)) == answer


@pytest.mark.parametrize("shape", [None, (32, 1), (256, 1)])
def test_every_kernel_draws_the_same_mask_for_any_tile_and_number_of_tokens(monkeypatch, shape):
    dropout = drop(0.4, 6)
    eye = torch.eye(100, dtype=torch.bfloat16)
    mask = drawn_mask(150, 300, dropout)
    if shape is not None:
        monkeypatch.setattr(triton_launch, "tile", lambda *_: shape)
    ones = torch.ones_like(mask)
    assert torch.equal(drawn_mask(150, 300, dropout), mask)
    assert torch.equal(drawn_mask(7, 90, dropout), mask[:7, :90])
    assert torch.equal(shrink(ones[:130, :100], eye, dropout), mask[:130, :100])
    assert torch.equal(grad_A(eye, ones[:100, :290], ones.dtype, dropout), mask[:100, :290])


@pytest.mark.parametrize("at_once", [1, 1000])
@pytest.mark.parametrize("rank", [5, 40])
def test_sums_are_right_however_many_programs_share_them(monkeypatch, at_once, rank):
    """Of one program, and of as many as the sizes allow; and s is laid out in the width of the rank's bucket."""
    monkeypatch.setattr(triton_launch, "_programs_at_once", lambda device: at_once)
    x = matrix(0, (700, 900), torch.bfloat16)
    a = matrix(1, (rank, 900), torch.bfloat16)
    s = shrink(x, a, dropout(None, 0.0, None))
    check(s, *product(x, a.mT), x.dtype)
    assert s.stride() == (rank_bucket(rank), 1)
    check(grad_A(s, x, torch.float32, dropout(None, 0.0, None)), *product(s.mT, x), torch.float32)


# Of the reference, which the kernels draw bit for bit.
@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_mask_keeps_its_share_and_seeds_rows_and_columns_are_independent(p):
    kept, other = (reference_mask(400, 600, p, seed) > 0 for seed in (7, 8))
    rate = round((1 - p) * 65536) / 65536
    assert abs(kept.double().mean() - rate) < 4 * (rate * (1 - rate) / kept.numel()) ** 0.5
    for dim, count in ((0, 400), (1, 600)):
        assert (kept.double().mean(dim) - rate).abs().max() < 6 * (rate * (1 - rate) / count) ** 0.5
    pairs = {"seeds": (kept, other), "rows": (kept[1:], kept[:-1])}
    pairs |= {f"columns {by} apart": (kept[:, by:], kept[:, :-by]) for by in (1, 32, 256)}
    for name, (one, two) in pairs.items():
        both = (one & two).double().mean()
        assert abs(both - rate**2) < 4 * (rate**2 * (1 - rate**2) / one.numel()) ** 0.5, name


class Subscripted:
    def __init__(self, function):
        self.function = function

    def __getitem__(self, index):
        return self.function(index)


class Work(TorchDispatchMode):
    """Names of what would be launched, ATen's operations and Triton's kernels, and the shapes that the latter touch."""

    def __init__(self):
        super().__init__()
        self.launched = []
        self.touched = []
        self.interpreting = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not (
            self.interpreting or func.is_view or name in ("promote_types", "empty", "new_empty", "empty_like", "detach")
        ):
            self.launched.append(name)
        return func(*args, **(kwargs or {}))

    def kernel(self, name, kernel):
        def launcher(grid):
            def launch(*arguments, **options):
                self.launched.append(name.removesuffix("_kernel"))
                self.touched += [tuple(each.shape) for each in arguments if isinstance(each, torch.Tensor)]
                self.interpreting = True
                kernel[grid](*arguments, **options)
                self.interpreting = False

            return launch

        return Subscripted(launcher)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_layer_touches_x_and_dy_as_often_as_its_products_read_them(monkeypatch, triton_interpreter, p):
    """Forward: x read, y written, then the frozen product; backward: dy read twice, x read, dx written, and the other.

    Factors in float32 are cast, and B is transposed, in one operation each; the seed is not read on the host.
    """
    # With one program at once, s has no partial sums.
    monkeypatch.setattr(triton_launch, "_programs_at_once", lambda device: 1)
    rows = 300
    d_in = 256
    d_out = 384
    rank = 5
    work = Work()
    kernels = triton_interpreter
    recorded = {name: work.kernel(name, getattr(kernels, name)) for name in dir(kernels) if name.endswith("_kernel")}
    monkeypatch.setattr(triton_launch, "_kernels", lambda: SimpleNamespace(**recorded))
    x, dy = (matrix(0, (rows, width), torch.bfloat16).requires_grad_() for width in (d_in, d_out))
    a = torch.randn(rank, d_in, requires_grad=True)
    b = torch.randn(d_out, rank, requires_grad=True)
    weight = matrix(1, (d_out, d_in), torch.bfloat16)
    with work:
        y = lora_linear(x, weight, None, a, b, 2.0, p, torch.tensor(1), backend="triton")
        forward = (work.launched, work.touched)
        work.launched = []
        work.touched = []
        torch.autograd.grad(y, (x, a, b), dy.detach())
    casts = ["copy_"] * 2
    wide = ((rows, d_in), (rows, d_out))
    assert sorted(forward[0]) == sorted([*casts, "shrink", "expand", "addmm_"])
    assert sorted(work.launched) == sorted([*casts, "shrink", *["grad_A", "sum_partials"] * 2, "expand", "addmm_"])
    assert [forward[1].count(shape) for shape in wide] == [1, 1]
    assert [work.touched.count(shape) for shape in wide] == [2, 2]
