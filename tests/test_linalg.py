"""Every claim against the dense product in float64: its SVD is the reference that the code never forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from dynrank.linalg import energy_kept, grow_product, numerical_rank, singular_values, truncate_product


def factors(d_out, d_in, rank, decay=0.5, seed=0, dtype=torch.float64):
    """(lora_B, lora_A) whose product has singular values of about decay**i."""
    generator = torch.Generator().manual_seed(seed)
    lora_B = torch.randn(d_out, rank, dtype=torch.float64, generator=generator)
    lora_A = torch.randn(rank, d_in, dtype=torch.float64, generator=generator)
    return (lora_B * decay ** torch.arange(rank)).to(dtype), lora_A.to(dtype)


@st.composite
def problems(draw):
    rank = draw(st.integers(1, 6))
    d_out, d_in = draw(st.integers(rank, 20)), draw(st.integers(rank, 20))
    decay = draw(st.sampled_from([1.0, 0.5, 0.1]))  # condition numbers from a few to about 1e5
    seed = draw(st.integers(0, 2**31))
    return *factors(d_out, d_in, rank, decay, seed), draw(st.integers(1, rank))


@settings(max_examples=60, deadline=None)
@given(problems())
def test_truncate_product_error_is_the_discarded_singular_values(problem):
    lora_B, lora_A, rank = problem
    u, s, vh = torch.linalg.svd(lora_B @ lora_A, full_matrices=False)
    change = truncate_product(lora_B, lora_A, rank)
    error = lora_B @ lora_A - change.lora_B @ change.lora_A
    # 1e-8 of the product's size: what float64 leaves after a condition number of 1e5
    scale = float(s[0])
    assert_close(error.norm(), s[rank : lora_A.shape[0]].norm(), rtol=1e-8, atol=1e-12 * scale)
    assert_close(change.dropped.norm(), error.norm(), rtol=1e-8, atol=1e-12 * scale)
    best = u[:, :rank] * s[:rank] @ vh[:rank]
    assert_close((lora_B @ lora_A - best).norm(), error.norm(), rtol=1e-8, atol=1e-12 * scale)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_truncate_product_factors_are_balanced_and_follow_from_the_maps(problem):
    lora_B, lora_A, rank = problem
    change = truncate_product(lora_B, lora_A, rank)
    gram_B, gram_A = change.lora_B.mT @ change.lora_B, change.lora_A @ change.lora_A.mT
    atol = 1e-10 * float(change.singular_values[0])  # rounding of the Gram matrices
    assert_close(gram_B, gram_A, rtol=1e-8, atol=atol)
    assert_close(gram_A, torch.diag(change.singular_values[:rank]), rtol=1e-8, atol=atol)
    # the maps divide by sqrt(sigma): their rounding grows with the condition number, 1e5 here
    assert_close(change.from_A @ lora_A, change.lora_A, rtol=1e-7, atol=1e-9 * float(change.singular_values[0]) ** 0.5)
    assert_close(lora_B @ change.from_B, change.lora_B, rtol=1e-7, atol=1e-9 * float(change.singular_values[0]) ** 0.5)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_singular_values_equal_those_of_the_dense_product(problem):
    lora_B, lora_A, _ = problem
    dense = torch.linalg.svdvals(lora_B @ lora_A)[: lora_A.shape[0]]
    assert_close(singular_values(lora_B, lora_A), dense, rtol=1e-8, atol=1e-12 * float(dense[0]))


def test_truncate_product_twice_equals_once():
    lora_B, lora_A = factors(9, 7, 5)
    first = truncate_product(lora_B, lora_A, 4)
    twice, once = truncate_product(first.lora_B, first.lora_A, 2), truncate_product(lora_B, lora_A, 2)
    assert_close(twice.lora_B @ twice.lora_A, once.lora_B @ once.lora_A)
    assert_close(twice.lora_A.abs(), once.lora_A.abs())  # balanced factors are unique up to the sign of a direction


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_truncate_product_keeps_the_dtype_and_computes_in_double(dtype):
    lora_B, lora_A = factors(9, 7, 4, dtype=dtype)
    change = truncate_product(lora_B, lora_A, 2)
    reference = truncate_product(lora_B.double(), lora_A.double(), 2)
    assert change.lora_A.dtype == change.lora_B.dtype == dtype
    assert torch.equal(change.lora_A, reference.lora_A.to(dtype))
    assert torch.equal(change.lora_B, reference.lora_B.to(dtype))


def test_truncate_product_keeps_the_first_rows_when_the_layer_is_fresh():
    _, lora_A = factors(9, 7, 4)
    change = truncate_product(torch.zeros(9, 4, dtype=torch.float64), lora_A, 3)
    assert torch.equal(change.lora_A, lora_A[:3])
    assert torch.equal(change.lora_B, torch.zeros(9, 3, dtype=torch.float64))


def _deficient(kind):
    """Factors of rank 4 whose product has rank 1."""
    lora_B, lora_A = factors(9, 7, 4, decay=1.0)
    if kind == "B":
        lora_B[:, 1:] = 0
    elif kind == "A":
        lora_A[1:] = lora_A[0]
    elif kind == "A, B orthonormal":
        lora_A[:] = lora_A[:1].clone()
        lora_B = torch.linalg.qr(lora_B).Q
    else:
        lora_B[:, 2:], lora_A[1:2] = 0, 0  # the product ends in one factor here, in the other there
    return lora_B, lora_A


@pytest.mark.parametrize("kind", ["B", "A", "A, B orthonormal", "both"])
def test_truncate_product_keeps_the_function_and_no_dead_direction_when_the_product_is_deficient(kind):
    lora_B, lora_A = _deficient(kind)
    change = truncate_product(lora_B, lora_A, 3)
    assert_close(change.lora_B @ change.lora_A, lora_B @ lora_A)
    # a direction learns as long as its row of A or its column of B isn't zero; rounding leaves about 1e-16
    alive = change.lora_A.norm(dim=1) + change.lora_B.norm(dim=0)
    assert (alive > 1e-8).all(), alive


def test_truncate_product_keeps_a_direction_alive_when_A_is_zero():
    lora_B, _ = factors(9, 7, 4)
    change = truncate_product(lora_B, torch.zeros(4, 7, dtype=torch.float64), 3)
    assert (change.lora_A.norm(dim=1) + change.lora_B.norm(dim=0) > 1e-8).all()


@pytest.mark.parametrize("rank", [4, 6, 7])
def test_grow_product_leaves_the_old_factors_and_the_product_bit_equal(rank):
    lora_B, lora_A = (factor.round() for factor in factors(9, 7, 4, decay=2.0))  # whole numbers: sums are exact
    change = grow_product(lora_B, lora_A, rank)
    assert torch.equal(change.lora_A[:4], lora_A)
    assert torch.equal(change.lora_B[:, :4], lora_B)
    assert torch.equal(change.lora_B @ change.lora_A, lora_B @ lora_A)


def test_grow_product_adds_orthogonal_rows_at_the_median_norm():
    lora_B, lora_A = factors(9, 12, 3)
    lora_A *= torch.tensor([[1.0], [10.0], [100.0]])
    rows = grow_product(lora_B, lora_A, 6).lora_A[3:]
    expected = lora_A.norm(dim=1).sort().values[1]
    assert_close(rows @ rows.mT, torch.eye(3, dtype=torch.float64) * expected**2)
    assert_close(rows @ lora_A.mT, torch.zeros(3, 3, dtype=torch.float64), rtol=0, atol=1e-9 * float(expected) ** 2)


def test_grow_product_draws_from_its_generator():
    lora_B, lora_A = factors(9, 7, 2)
    one, same, other = (
        grow_product(lora_B, lora_A, 5, generator=torch.Generator().manual_seed(seed)).lora_A for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


def test_grow_then_truncate_is_the_identity():
    balanced = truncate_product(*factors(9, 7, 3), 3)
    grown = grow_product(balanced.lora_B, balanced.lora_A, 6)
    back = truncate_product(grown.lora_B, grown.lora_A, 3)
    assert_close(back.lora_B @ back.lora_A, balanced.lora_B @ balanced.lora_A)
    assert_close(back.lora_A.abs(), balanced.lora_A.abs())  # unique up to the sign of a direction


@pytest.mark.parametrize("function", [truncate_product, grow_product, lambda b, a, rank: singular_values(b, a)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["lora_A", "lora_B"])
def test_functions_name_the_factor_that_is_not_finite(function, value, which):
    pair = dict(zip(("lora_B", "lora_A"), factors(9, 7, 4), strict=True))
    pair[which][1, 1] = value
    with pytest.raises(ValueError, match=f"{which} must be finite"):
        function(pair["lora_B"], pair["lora_A"], 4)


@pytest.mark.parametrize("function", [truncate_product, grow_product, lambda b, a, rank: singular_values(b, a)])
@pytest.mark.parametrize("shapes", [((9, 4), (3, 7)), ((9,), (9, 7)), ((9, 4), (4, 7, 1))])
def test_functions_refuse_shapes_that_form_no_product(function, shapes):
    with pytest.raises(ValueError, match="factors must be"):
        function(torch.ones(shapes[0]), torch.ones(shapes[1]), 3)


@pytest.mark.parametrize(
    ("function", "rank"), [(truncate_product, 0), (truncate_product, 5), (grow_product, 3), (grow_product, 8)]
)
def test_functions_refuse_a_rank_out_of_range(function, rank):
    with pytest.raises(ValueError, match=f"rank must be between .* got {rank}"):
        function(*factors(9, 7, 4), rank)


def test_numerical_rank_equals_torch_matrix_rank():
    for rank in range(5):
        product = torch.matmul(*factors(9, 7, 4)) if rank == 4 else torch.zeros(9, 7, dtype=torch.float64)
        if 0 < rank < 4:
            product = torch.matmul(*factors(9, 7, rank))
        assert numerical_rank(torch.linalg.svdvals(product), 9) == torch.linalg.matrix_rank(product) == rank


def test_energy_kept_is_the_share_of_the_squared_frobenius_norm():
    lora_B, lora_A = factors(9, 7, 4)
    change = truncate_product(lora_B, lora_A, 2)
    share = (change.lora_B @ change.lora_A).square().sum() / (lora_B @ lora_A).square().sum()
    assert energy_kept(change.singular_values, 2) == pytest.approx(float(share), rel=1e-10)
    assert energy_kept(change.singular_values, 4) == 1.0
    assert energy_kept(torch.zeros(3), 1) == 1.0


def test_truncation_of_rounded_rank_deficient_factors_takes_no_noise_for_signal():
    """Directions that only float32's rounding holds up would be rows of about 1e-4: too small to learn."""
    b = (torch.randn(60, 4, dtype=torch.float64) @ torch.randn(4, 12, dtype=torch.float64)).float()
    a = torch.randn(12, 50)
    change = truncate_product(b, a, 8)
    assert change.lora_A.norm(dim=1).min() > 0.1
    assert change.lora_B[:, 4:].abs().max() == 0
    assert (b @ a - change.lora_B @ change.lora_A).norm() <= 1e-5 * (b @ a).norm()
