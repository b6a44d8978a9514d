"""Every claim against the dense product in float64: its SVD is the reference that the code never forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from dynrank.linalg import (
    effective_rank,
    energy_kept,
    energy_rank,
    grow_product,
    numerical_rank,
    singular_values,
    truncate_product,
)


def factors(d_out, d_in, rank, decay=0.5, seed=0, dtype=torch.float64):
    """(lora_B, lora_A) whose product has singular values of about decay**i."""
    generator = torch.Generator().manual_seed(seed)
    lora_B = torch.randn(d_out, rank, dtype=torch.float64, generator=generator)
    lora_A = torch.randn(rank, d_in, dtype=torch.float64, generator=generator)
    return (lora_B * decay ** torch.arange(rank)).to(dtype), lora_A.to(dtype)


@st.composite
def problems(draw):
    """(lora_B, lora_A, rank to keep), with condition numbers from a few to about 1e5."""
    rank = draw(st.integers(1, 6))
    d_out = draw(st.integers(rank, 20))
    d_in = draw(st.integers(rank, 20))
    decay = draw(st.sampled_from([1.0, 0.5, 0.1]))
    seed = draw(st.integers(0, 2**31))
    return *factors(d_out, d_in, rank, decay, seed), draw(st.integers(1, rank))


def product(change):
    return change.lora_B @ change.lora_A


def alive(change):
    """Whether each direction can learn: as long as its row of A or its column of B isn't zero."""
    # Rounding leaves about 1e-16 of a zero.
    return change.lora_A.norm(dim=1) + change.lora_B.norm(dim=0) > 1e-8


# Truncation


@st.composite
def choices(draw):
    """(lora_B, lora_A, rank, directions to keep: None for the largest)."""
    lora_B, lora_A, rank = draw(problems())
    some = st.sets(st.integers(0, len(lora_A) - 1), min_size=rank, max_size=rank)
    return lora_B, lora_A, rank, draw(st.none() | some.map(lambda chosen: torch.tensor(sorted(chosen))))


@settings(max_examples=100, deadline=None)
@given(choices())
def test_truncation_keeps_terms_of_the_dense_svd(problem):
    lora_B, lora_A, rank, keep = problem
    u, s, vh = torch.linalg.svd(lora_B @ lora_A, full_matrices=False)
    kept = torch.arange(rank) if keep is None else keep
    change = truncate_product(lora_B, lora_A, rank, keep=keep)
    assert_close(change.singular_values, s[: len(lora_A)], rtol=1e-8, atol=1e-12 * float(s[0]))
    assert_close(singular_values(lora_B, lora_A), change.singular_values, rtol=1e-12, atol=1e-12 * float(s[0]))
    gone = torch.tensor([i for i in range(len(lora_A)) if i not in kept.tolist()], dtype=torch.int64)
    error = (lora_B @ lora_A - product(change)).norm()
    assert_close(error, s[gone].norm(), rtol=1e-8, atol=1e-11 * float(s[0]))
    gaps = [abs(float(s[i] - s[j])) for i in kept for j in gone]
    if gaps and min(gaps) < 1e-3 * s[0]:
        # Rounding decides which of two directions of one size is which.
        return
    terms = (u[:, kept] * s[kept]) @ vh[kept]
    assert_close(product(change), terms, rtol=1e-8, atol=1e-8 * float(s[0]))


@settings(max_examples=60, deadline=None)
@given(choices())
def test_truncated_factors_are_balanced_and_follow_from_the_maps(problem):
    lora_B, lora_A, rank, keep = problem
    change = truncate_product(lora_B, lora_A, rank, keep=keep)
    gram_B = change.lora_B.mT @ change.lora_B
    gram_A = change.lora_A @ change.lora_A.mT
    largest = float(change.singular_values[0])
    kept = change.singular_values[:rank] if keep is None else change.singular_values[keep]
    assert_close(gram_B, gram_A, rtol=1e-8, atol=1e-8 * largest)
    assert_close(gram_A, torch.diag(kept), rtol=1e-7, atol=1e-8 * largest)
    if kept[-1] > 1e-6 * largest:
        # the maps divide by roots of singular values down to 1e-6 of the largest
        assert_close(change.from_A @ lora_A, change.lora_A, rtol=1e-6, atol=1e-6 * largest**0.5)
        assert_close(lora_B @ change.from_B, change.lora_B, rtol=1e-6, atol=1e-6 * largest**0.5)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e30])
def test_truncation_knows_the_product_alone_however_its_scale_is_shared(scale):
    lora_B, lora_A = factors(9, 7, 4, dtype=torch.float32)
    change = truncate_product(lora_B / scale, lora_A * scale, 2)
    # float32 factors, rounded once more by the scale
    assert_close(product(change), product(truncate_product(lora_B, lora_A, 2)), rtol=1e-5, atol=1e-6)
    assert torch.isfinite(change.from_A).all()
    assert torch.isfinite(change.from_B).all()


# What has no place in the ranking


def test_truncation_of_a_fresh_layer_keeps_its_first_rows():
    _, lora_A = factors(9, 7, 4)
    change = truncate_product(torch.zeros(9, 4, dtype=torch.float64), lora_A, 3)
    assert_close(change.lora_A, lora_A[:3])
    assert not change.lora_B.any()


def _deficient(kind):
    """Factors of rank 4 whose product has rank 1, or 0."""
    lora_B, lora_A = factors(9, 7, 4, decay=1.0)
    if kind == "B":
        lora_B[:, 1:] = 0
    elif kind == "A":
        lora_A[1:] = lora_A[0]
    elif kind == "A, B orthonormal":
        lora_A[:] = lora_A[:1].clone()
        lora_B = torch.linalg.qr(lora_B).Q
    elif kind == "both":
        lora_B[:, 2:] = 0
        lora_A[1:2] = 0
    else:
        lora_A[:] = 0
    return lora_B, lora_A


@pytest.mark.parametrize("kind", ["B", "A", "A, B orthonormal", "both", "A is zero"])
def test_truncation_of_a_deficient_product_keeps_no_dead_direction(kind):
    lora_B, lora_A = _deficient(kind)
    change = truncate_product(lora_B, lora_A, 3)
    assert_close(product(change), lora_B @ lora_A)
    assert alive(change).all()


def test_directions_without_a_product_bring_back_none_that_is_dropped():
    # The product has rank 1.
    lora_B, lora_A = _deficient("both")
    change = truncate_product(lora_B, lora_A, 3, keep=torch.tensor([1, 2, 3]))
    assert_close(product(change), torch.zeros(9, 7, dtype=torch.float64), rtol=0, atol=1e-12)
    assert alive(change).all()


def test_truncation_of_rounded_rank_deficient_factors_takes_no_noise_for_signal():
    """Directions that only float32's rounding holds up would be rows of about 1e-4: too small to learn."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(60, 4, generator=generator).double()
    right = torch.randn(4, 12, generator=generator).double()
    b = (left @ right).float()
    a = torch.randn(12, 50, generator=generator)
    change = truncate_product(b, a, 8)
    assert change.lora_A.norm(dim=1).min() > 0.1
    assert change.lora_B[:, 4:].abs().max() == 0
    assert (b @ a - product(change)).norm() <= 1e-5 * (b @ a).norm()


def test_truncation_of_a_long_product_keeps_small_directions():
    """In an embedding, max(d_out, d_in) * eps of float32 would be 0.6% of the largest singular value."""
    lora_B, lora_A = factors(50_000, 9, 3, dtype=torch.float32)
    lora_B = torch.linalg.qr(lora_B).Q * torch.tensor([1.0, 4e-3, 1e-4])
    change = truncate_product(lora_B, lora_A, 3)
    assert_close(product(change), lora_B @ lora_A, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_truncation_computes_in_double_whatever_the_dtype(dtype):
    lora_B, lora_A = factors(9, 7, 4, dtype=dtype)
    change = truncate_product(lora_B, lora_A, 2)
    reference = truncate_product(lora_B.double(), lora_A.double(), 2)
    assert {t.dtype for t in (change.from_A, change.from_B, change.singular_values)} == {torch.float64}
    assert torch.equal(change.lora_A, reference.lora_A.to(dtype))
    assert torch.equal(change.lora_B, reference.lora_B.to(dtype))


# Growth


@settings(max_examples=40, deadline=None)
@given(problems(), st.data())
def test_growth_adds_rows_orthogonal_to_the_old_and_columns_of_zeros(problem, data):
    lora_B, lora_A, _ = problem
    rank = lora_A.shape[0]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    to = data.draw(st.integers(rank, min(lora_B.shape[0], lora_A.shape[1])))
    grown = grow_product(lora_B, lora_A, to, generator=generator)
    assert torch.equal(grown.lora_B[:, :rank], lora_B)
    assert torch.equal(grown.lora_A[:rank], lora_A)
    assert not grown.lora_B[:, rank:].any()
    rows = grown.lora_A[rank:]
    size = lora_A.norm(dim=1).median()
    assert_close(rows @ rows.mT, torch.eye(to - rank, dtype=torch.float64) * size**2)
    assert_close(rows @ lora_A.mT, torch.zeros(to - rank, rank).double(), rtol=0, atol=1e-9 * float(lora_A.norm()) ** 2)


# Refusals


@pytest.mark.parametrize("function", [truncate_product, grow_product, lambda b, a, rank: singular_values(b, a)])
def test_functions_name_what_they_cannot_use(function):
    for which in ("lora_A", "lora_B"):
        for value in (float("nan"), float("inf"), 1e300):
            pair = dict(zip(("lora_B", "lora_A"), factors(9, 7, 4), strict=True))
            pair[which][1, 1] = value
            with pytest.raises(ValueError, match=f"{which} must be finite"):
                function(pair["lora_B"], pair["lora_A"], 4)
    for b, a in [((9, 4), (3, 7)), ((9,), (9, 7)), ((9, 4), (4, 7, 1))]:
        with pytest.raises(ValueError, match="factors must be"):
            function(torch.ones(b), torch.ones(a), 3)


@pytest.mark.parametrize(
    ("function", "rank", "options", "message"),
    [
        (truncate_product, 0, {}, "rank must be between .* got 0"),
        (truncate_product, 5, {}, "rank must be between .* got 5"),
        (truncate_product, 2, {"keep": torch.tensor([0, 4])}, r"keep must be 2 ascending .* out of 4, got \[0, 4\]"),
        (truncate_product, 2, {"keep": torch.tensor([1, 1])}, r"keep must be .* got \[1, 1\]"),
        (truncate_product, 2, {"keep": torch.tensor([1])}, r"keep must be .* got \[1\]"),
        (grow_product, 3, {}, "rank must be between .* got 3"),
        (grow_product, 8, {}, "rank must be between .* got 8"),
    ],
)
def test_functions_refuse_arguments_out_of_range(function, rank, options, message):
    with pytest.raises(ValueError, match=message):
        function(*factors(9, 7, 4), rank, **options)


# Ranks of a spectrum

SPECTRA = st.lists(st.one_of(st.floats(1e-6, 1e3), st.just(0.0)), min_size=1, max_size=8).map(
    lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
)


def test_energy_kept_is_the_share_of_the_squared_frobenius_norm():
    lora_B, lora_A = factors(9, 7, 4)
    change = truncate_product(lora_B, lora_A, 2)
    share = product(change).square().sum() / (lora_B @ lora_A).square().sum()
    assert energy_kept(change.singular_values, 2) == pytest.approx(float(share), rel=1e-10)
    assert energy_kept(change.singular_values, 4) == energy_kept(torch.zeros(3), 1) == 1.0


@given(SPECTRA, st.floats(0.01, 1.0))
def test_energy_rank_is_the_least_that_keeps_the_share(values, share):
    rank = energy_rank(values, share)
    squares = [float(v) ** 2 for v in values]
    assert 1 <= rank <= len(squares)
    assert sum(squares[:rank]) >= share * sum(squares) * (1 - 1e-9)
    if rank > 1:
        assert sum(squares[: rank - 1]) < share * sum(squares)


@pytest.mark.parametrize(
    ("values", "share", "rank"),
    [
        # The squares are 4, 1 and 1, so one value holds exactly the share.
        ([2.0, 1.0, 1.0], 4 / 6, 1),
        ([2.0, 1.0, 1.0], 0.67, 2),
        # In floats 0.07 * 100 is above 7.
        ([1.0] * 100, 0.07, 7),
        # A value below rounding does not count.
        ([1.0, 1.0, 1e-6], 1.0, 2),
        ([0.0, 0.0], 0.9, 1),
        ([], 0.9, 1),
    ],
)
def test_energy_rank_by_hand(values, share, rank):
    assert energy_rank(torch.tensor(values), share) == rank


@given(SPECTRA)
def test_effective_rank_is_the_exponential_of_the_entropy(values):
    total = float(values.sum())
    shares = [float(v) / total for v in values if v > 0]
    expected = math.exp(-sum(p * math.log(p) for p in shares)) if shares else 1.0
    assert effective_rank(values) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("tolerance", "rank"), [(1e-3, 3), (2e-3, 2), (0.4, 2), (0.6, 1), (1.0, 0)])
def test_numerical_rank_counts_what_is_above_the_tolerance_times_the_largest(tolerance, rank):
    assert numerical_rank(torch.tensor([2.0, 1.0, 3e-3], dtype=torch.float64), 1, tolerance) == rank


@pytest.mark.parametrize("rank", range(1, 6))
def test_numerical_rank_is_that_of_torch(rank):
    dense = torch.matmul(*factors(9, 7, rank))
    assert numerical_rank(torch.linalg.svdvals(dense), 9) == torch.linalg.matrix_rank(dense) == rank
    assert numerical_rank(torch.zeros(3), 9) == numerical_rank(torch.zeros(0), 9) == 0
