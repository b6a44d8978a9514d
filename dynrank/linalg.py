"""Changes of the rank of a product ``B @ A``, computed without forming the product.

A *direction* of the product is one of its singular values with the left and right singular vectors: rank counts them.
Shape suffixes: O = d_out, I = d_in, R = current rank, K = new rank, N = any width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# A norm below this share of the factor's norm is a rounding error of float64.
_ROUNDING = 1e-10


class Shape(Protocol):
    """The shape of stacked products ``B @ A`` of one rank."""

    @property
    def d_out(self) -> int: ...

    @property
    def d_in(self) -> int: ...

    @property
    def num_products(self) -> int: ...


class OfShape:
    """What follows from a :class:`Shape`, for a class that has its three attributes."""

    __slots__ = ()
    # What the highest rank is, in words.
    bound: ClassVar[str] = "min(d_in, d_out)"

    @property
    def max_rank(self: Shape) -> int:
        """The highest possible rank, min(d_in, d_out)."""
        return min(self.d_in, self.d_out)

    @property
    def params_per_rank(self: Shape) -> int:
        """(d_out + d_in) * num_products: the parameters of one direction."""
        return (self.d_out + self.d_in) * self.num_products


@dataclass(frozen=True)
class RankChange:
    """New factors of a product, and the linear maps from the old factors to the new ones.

    ``lora_A == from_A @ old_A`` and ``lora_B == old_B @ from_B``, with two exceptions. In a direction beyond the
    numerical rank (truncation) one of the two factors is exactly zero. In a new direction (growth) the maps and the
    column of ``lora_B`` are zero, and the row of ``lora_A`` is random. Gradients are covectors, so they transform by
    the transposed maps: the gradient of A by ``from_B.T``, the gradient of B by ``from_A.T``.

    Attributes:
        lora_A: (K, I), the dtype of the old A.
        lora_B: (O, K), the dtype of the old B.
        from_A: (K, R) float64; (count, K, R) for a layer that stacks several products, see :func:`stacked`.
        from_B: (R, K) float64, or (count, R, K).
        singular_values: (R,) float64, of the old product, descending.
    """

    lora_A: Tensor
    lora_B: Tensor
    from_A: Tensor
    from_B: Tensor
    singular_values: Tensor


def singular_values(lora_B: Tensor, lora_A: Tensor) -> Tensor:
    """The R singular values of ``lora_B @ lora_A``, descending, float64; zeros beyond min(O, I)."""
    _check_factors(lora_B, lora_A)
    r_b, r_a = _triangles(lora_B.double(), lora_A.double())
    return _padded(torch.linalg.svdvals(r_b @ r_a.mT), lora_A.shape[0])


def product_norm(lora_B: Tensor, lora_A: Tensor) -> float:
    """The Frobenius norm of ``lora_B @ lora_A``, (O, R) and (R, I), computed in float64 without forming the product."""
    r_b, r_a = _triangles(lora_B.double(), lora_A.double())
    return float((r_b @ r_a.mT).norm())


def numerical_rank(values: Tensor, largest_dim: int, eps: float = torch.finfo(torch.float64).eps) -> int:
    """How many singular values exceed the rounding error: ``sigma_i > largest_dim * eps * sigma_1``.

    Args:
        values: singular values, descending, (R,).
        largest_dim: max(d_out, d_in) of a product that was formed; the rank, if only its two factors were rounded.
        eps: machine epsilon of the factors' dtype; float32's for narrower dtypes, since their own leaves rank 0.

    >>> numerical_rank(torch.tensor([2.0, 1.0, 1e-17]), largest_dim=100)
    2
    """
    if values.numel() == 0 or values[0] == 0:
        return 0
    return int((values > largest_dim * eps * values[0]).sum())


def energy_kept(values: Tensor, rank: int) -> float:
    """Share of the energy (sum of squared singular values) in the first ``rank``; 1.0 for a zero product.

    >>> energy_kept(torch.tensor([2.0, 1.0]), 1)
    0.8
    """
    energy = values.double().square()
    total = energy.sum()
    return 1.0 if total == 0 else float(energy[:rank].sum() / total)


def energy_rank(values: Tensor, share: float) -> int:
    """Fewest directions that keep ``share`` of the energy (sum of squared singular values), at least 1.

    >>> energy_rank(torch.tensor([2.0, 1.0, 0.1]), 0.99)
    2
    """
    energy = values.double().square().cumsum(0)
    if energy.numel() == 0 or energy[-1] == 0:
        return 1
    # This factor keeps rounding errors from adding a direction, for example one below rounding at a share of 1.0.
    return 1 + int((energy < share * energy[-1] * (1 - _ROUNDING)).sum())


def effective_rank(values: Tensor) -> float:
    """``exp`` of the entropy of the normalised singular values (Roy and Vetterli, 2007), in [1, R]; 1.0 for zero.

    >>> round(effective_rank(torch.ones(4)), 6), effective_rank(torch.tensor([3.0, 0.0]))
    (4.0, 1.0)
    """
    total = values.double().sum()
    if total == 0:
        return 1.0
    p = values.double() / total
    return float(torch.exp(-torch.xlogy(p, p).sum()))


@dataclass(frozen=True)
class Directions:
    """The directions of a product ``B @ A``, as maps from its factors: all that :func:`keep_directions` needs.

    Attributes:
        from_A: (L, R) float64, L is the numerical rank. ``from_A @ A`` is ``sqrt(S) V^T`` of the product's SVD.
        from_B: (R, L) float64. ``B @ from_B`` is ``U sqrt(S)``.
        singular_values: (R,) float64, descending; zeros beyond min(O, I).
    """

    from_A: Tensor
    from_B: Tensor
    singular_values: Tensor


@torch.no_grad()
def directions_of(lora_B: Tensor, lora_A: Tensor) -> Directions:
    """The directions of ``lora_B @ lora_A``.

    With the QR decompositions ``B = Q_b R_b`` and ``A^T = Q_a R_a`` and the SVD ``R_b R_a^T = U S V^T``, the maps are
    ``S^-1/2 U^T R_b`` and ``R_a^T V S^-1/2``. Cost: O((O + I) R^2); the product is never formed.

    Args:
        lora_B: (O, R), floating point.
        lora_A: (R, I), floating point.

    Raises:
        ValueError: if the shapes do not form a product, or a factor is not finite.
    """
    _check_factors(lora_B, lora_A)
    r_b, r_a = _triangles(lora_B.double(), lora_A.double())
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    # The SVD does not determine signs, so this rule does: the largest element of a left singular vector is positive.
    signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    u = u * signs
    vh = vh * signs.mT
    eps = torch.finfo(torch.promote_types(torch.promote_types(lora_A.dtype, lora_B.dtype), torch.float32)).eps
    # The factors alone are rounded, by at most sqrt(R) eps of their norms, and their product is never formed.
    live = numerical_rank(s, len(lora_A), eps)
    root = s[:live].sqrt()
    return Directions((u[:, :live] / root).mT @ r_b, r_a.mT @ (vh[:live].mT / root), _padded(s, len(lora_A)))


@torch.no_grad()
def keep_directions(lora_B: Tensor, lora_A: Tensor, directions: Directions, keep: Tensor) -> RankChange:
    """Factors of the directions ``keep`` of ``lora_B @ lora_A``: the balanced SVD of their product.

    In directions beyond the numerical rank B' is zero and A' keeps independent combinations of the old rows. (Where
    these rows are zero, A' is zero and B' keeps combinations of old columns.) So the layer can still learn: if both
    factors were zero, their gradients would stay zero. For a new layer (B = 0) A' is the first rows of A.

    Args:
        lora_B: (O, R), floating point.
        lora_A: (R, I), floating point.
        directions: the result of :func:`directions_of` for these factors.
        keep: (K,) indices of the directions to keep, ascending, 0 is the largest; 1 <= K <= R.

    Raises:
        ValueError: if ``keep`` is not one or more different directions.
    """
    old_rank = len(lora_A)
    keep = keep.cpu()
    if not len(keep) or keep[0] < 0 or keep[-1] >= old_rank or not (keep.diff() > 0).all():
        raise ValueError(f"keep must be {len(keep)} ascending directions out of {old_rank}, got {keep.tolist()}")
    b_OR = lora_B.double()
    a_RI = lora_A.double()
    chosen = keep[keep < len(directions.from_A)].to(lora_A.device)
    from_A_KR = directions.from_A[chosen]
    from_B_RK = directions.from_B[:, chosen]
    new_A = from_A_KR @ a_RI
    new_B = b_OR @ from_B_RK
    if len(chosen) < len(keep):
        idle = _complement(directions.from_A)
        # In each of these directions the row or the column is zero, because their product is, if A has full rank.
        rows = idle.mT @ a_RI
        columns = b_OR @ idle
        in_A = rows.norm(dim=1) > _ROUNDING * a_RI.norm()
        in_B = ~in_A & (columns.norm(dim=0) > _ROUNDING * b_OR.norm())
        kept = torch.argsort((in_A | in_B).int(), descending=True, stable=True)[: len(keep) - len(chosen)]
        from_A_KR = torch.cat([from_A_KR, idle[:, kept].mT])
        from_B_RK = torch.cat([from_B_RK, idle[:, kept]], dim=1)
        new_A = torch.cat([new_A, (rows * in_A[:, None])[kept]])
        new_B = torch.cat([new_B, (columns * in_B)[:, kept]], dim=1)
    factors = new_A.to(lora_A.dtype), new_B.to(lora_B.dtype)
    return RankChange(*factors, from_A_KR, from_B_RK, directions.singular_values)


def truncate_product(lora_B: Tensor, lora_A: Tensor, rank: int, *, keep: Tensor | None = None) -> RankChange:
    """Factors of ``rank`` directions of ``lora_B @ lora_A``: by default the largest, which approximate it best.

    The new factors are balanced, ``B' = Q_b U sqrt(S)`` and ``A' = sqrt(S) V^T Q_a^T`` (Eckart and Young, 1936). Their
    error in the Frobenius norm is the norm of the dropped singular values. See :func:`directions_of` for the symbols,
    and :func:`keep_directions` for directions beyond the numerical rank.

    Args:
        lora_B: (O, R), floating point.
        lora_A: (R, I), floating point.
        rank: K, how many directions to keep, 1 <= K <= R.
        keep: (K,) indices of the directions to keep, ascending, 0 is the largest; the first K when None.

    Raises:
        ValueError: if ``rank`` is outside [1, R], ``keep`` is not K different directions, the shapes do not form a
            product, or a factor is not finite.
    """
    directions = directions_of(lora_B, lora_A)
    if not 1 <= rank <= len(lora_A):
        raise ValueError(f"rank must be between 1 and the current rank {len(lora_A)}, got {rank}")
    if keep is not None and len(keep) != rank:
        raise ValueError(f"keep must be {rank} directions, got {keep.tolist()}")
    return keep_directions(lora_B, lora_A, directions, torch.arange(rank) if keep is None else keep)


@torch.no_grad()
def grow_product(
    lora_B: Tensor,
    lora_A: Tensor,
    rank: int,
    *,
    generator: torch.Generator | None = None,
) -> RankChange:
    """Factors of the same product with ``rank`` directions: the new columns of B are zero.

    New rows of A are random, orthogonal to the old rows and to each other, and have the median norm of the old rows.

    Args:
        lora_B: (O, R), floating point.
        lora_A: (R, I), floating point.
        rank: K, R <= K <= min(O, I).
        generator: generator of the random rows; torch's default generator when None.

    Raises:
        ValueError: if ``rank`` is outside [R, min(O, I)], the shapes do not form a product, or a value is not finite.
    """
    _check_factors(lora_B, lora_A)
    d_out, old_rank = lora_B.shape
    d_in = lora_A.shape[1]
    if not old_rank <= rank <= min(d_out, d_in):
        raise ValueError(f"rank must be between {old_rank} and min(d_out, d_in) = {min(d_out, d_in)}, got {rank}")
    a_RI = lora_A.double()
    count = rank - old_rank
    norms = a_RI.norm(dim=1)
    size = norms[norms > 0].median() if norms.any() else 1.0
    old = torch.linalg.qr(a_RI.mT).Q
    fresh = torch.randn(d_in, count, dtype=torch.float64, generator=generator).to(a_RI.device)
    rows = torch.linalg.qr(torch.cat([old, fresh], dim=1)).Q[:, old_rank:].mT * size
    maps = torch.eye(rank, old_rank, dtype=torch.float64, device=a_RI.device)
    return RankChange(
        lora_A=torch.cat([lora_A, rows.to(lora_A.dtype)]),
        lora_B=torch.cat([lora_B, lora_B.new_zeros(d_out, count)], dim=1),
        from_A=maps,
        from_B=maps.mT.contiguous(),
        singular_values=singular_values(lora_B, lora_A),
    )


def split(factor: Tensor, count: int, dim: int) -> Tensor:
    """(count, rank, width): the factors of ``count`` products that ``factor`` stacks, as a view.

    Convolution filters count as rows. The order is that of PEFT's expert tensors. lora_A (``dim=0``) is
    (count * rank, I), and the product is the slowest index; lora_B (``dim=1``) is (O, rank * count), and the product
    is the fastest.
    """
    factor = factor.flatten(1)
    if dim == 0:
        return factor.reshape(count, -1, factor.shape[1])
    return factor.reshape(len(factor), -1, count).permute(2, 1, 0)


def joined(parts: Tensor, dim: int) -> Tensor:
    """The inverse of :func:`split`, contiguous."""
    return (parts.flatten(0, 1) if dim == 0 else parts.permute(2, 1, 0).flatten(1)).contiguous()


def products(lora_B: Tensor, lora_A: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    """(lora_B (O, R), lora_A (R, I)) of each stacked product, as views; see :func:`split`."""
    return [(b.mT, a) for b, a in zip(split(lora_B, count, 1), split(lora_A, count, 0), strict=True)]


def stacked(changes: Sequence[RankChange]) -> RankChange:
    """One change for all products of a layer, which all go to the same rank: maps (count, K, R) and (count, R, K)."""
    return RankChange(
        lora_A=joined(torch.stack([change.lora_A for change in changes]), 0),
        lora_B=joined(torch.stack([change.lora_B.mT for change in changes]), 1),
        from_A=torch.stack([change.from_A for change in changes]),
        from_B=torch.stack([change.from_B for change in changes]),
        singular_values=pooled([change.singular_values for change in changes]),
    )


def pooled(spectra: Sequence[Tensor]) -> Tensor:
    """One spectrum for products that always have one rank: the root of the sum of squares over the products.

    A cut of all products from k + 1 to k directions changes them by exactly ``values[k]`` in the Frobenius norm.
    """
    values: Tensor = torch.stack([*spectra]).square().sum(0).sqrt()
    return values


def _padded(values: Tensor, count: int) -> Tensor:
    return F.pad(values, (0, count - len(values)))


def _triangles(b_OR: Tensor, a_RI: Tensor) -> tuple[Tensor, Tensor]:
    """The triangular factors of the QR decompositions of B and of A^T, at most (R, R) each."""
    return torch.linalg.qr(b_OR, mode="r").R, torch.linalg.qr(a_RI.mT, mode="r").R


def _complement(rows_NR: Tensor) -> Tensor:
    """An orthonormal basis (R, R - N) of the space orthogonal to N independent rows; the identity when N = 0."""
    count, width = rows_NR.shape
    if count == 0:
        return torch.eye(width, dtype=rows_NR.dtype, device=rows_NR.device)
    basis: Tensor = torch.linalg.qr(rows_NR.mT, mode="complete").Q
    return basis[:, count:]


def _check_factors(lora_B: Tensor, lora_A: Tensor) -> None:
    if lora_B.ndim != 2 or lora_A.ndim != 2 or lora_B.shape[1] != lora_A.shape[0]:
        raise ValueError(f"factors must be (d_out, rank) and (rank, d_in), got {[*lora_B.shape]} and {[*lora_A.shape]}")
    for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
        if not finite(factor):
            raise ValueError(f"{name} must be finite, got NaN, inf or a number too large for float32")


def finite(values: Tensor) -> bool:
    """Whether all values are finite in float32; the products of larger ones could overflow even in float64."""
    return bool(values.float().isfinite().all())
