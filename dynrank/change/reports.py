"""The effect of a change of ranks on each layer."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from dynrank.errors import described
from dynrank.linalg import energy_kept


@dataclass(frozen=True, repr=False)
class LayerReport:
    """The effect of a change of rank on one layer.

    Attributes:
        layer: its name in the model.
        rank_before: rank before the change.
        rank_after: rank after the change.
        energy_kept: share of the energy (sum of squared singular values) that is kept, in [0, 1].
        predicted_error: norm of the dropped singular values, the Frobenius norm of the update's change.
        singular_values: singular values of the update before the change (scaling included), descending.
        params_per_rank: d_out + d_in (times the experts), the parameters of one direction.
        importance: the decrease of the loss by the layer's updates in this run before the change (see
            :mod:`dynrank.importance.importance`); None if unknown.
        importance_error: its standard error; None if unknown. The sum of both (of the importance, at least 0) is the
            reason for the layer's rank in a pool.
    """

    layer: str
    rank_before: int
    rank_after: int
    energy_kept: float
    predicted_error: float
    singular_values: tuple[float, ...] = field(repr=False)
    params_per_rank: int
    importance: float | None = None
    importance_error: float | None = None

    __repr__ = described

    @property
    def parameters_saved(self) -> int:
        """How many trainable parameters the change removes (negative for growth)."""
        return (self.rank_before - self.rank_after) * self.params_per_rank

    @property
    def score(self) -> float | None:
        """What the rank of the layer in a pool is in proportion to: its importance, at least 0, plus the error."""
        if self.importance is None or self.importance_error is None:
            return None
        return score(self.importance, self.importance_error)


def score(importance: float, error: float) -> float:
    """What the ranks of a pool are in proportion to; the error leaves a chance to a layer that noise may have hidden.

    >>> score(0.5, 0.25), score(-0.5, 0.25)
    (0.75, 0.25)
    """
    return max(importance, 0.0) + error


def report_of(name: str, rank: int, values: Tensor, params_per_rank: int) -> LayerReport:
    """The report of a change to ``rank`` of a layer with these singular values (scaling included)."""
    return LayerReport(
        layer=name,
        rank_before=len(values),
        rank_after=rank,
        energy_kept=energy_kept(values, rank),
        predicted_error=float(values[rank:].norm()),
        singular_values=tuple(values.tolist()),
        params_per_rank=params_per_rank,
    )
