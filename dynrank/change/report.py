"""The effect of a change of ranks on each layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynrank.change.greedy import LossChange
from dynrank.linalg import energy_kept


@dataclass(frozen=True)
class LayerReport:
    """The effect of a change of rank on one layer.

    Attributes:
        layer: its name in the model.
        rank_before: rank before the change.
        rank_after: rank after the change.
        energy_kept: share of the energy (sum of squared singular values) that is kept, in [0, 1].
        predicted_error: norm of the dropped singular values, the Frobenius norm of the update's change.
        singular_values: singular values of the update before the change (scaling included), descending.
        width: d_out + d_in (times the experts), the parameters of one direction.
        loss: the layer's part of the estimated change of the loss; None without gates.
    """

    layer: str
    rank_before: int
    rank_after: int
    energy_kept: float
    predicted_error: float
    singular_values: tuple[float, ...]
    width: int
    loss: LossChange | None = None

    @property
    def parameters_saved(self) -> int:
        """How many trainable parameters the change removes (negative for growth)."""
        return (self.rank_before - self.rank_after) * self.width


def report_of(
    name: str, rank: int, values: Tensor, width: int, kept: Tensor | None = None, loss: LossChange | None = None
) -> LayerReport:
    """The report of a change to ``rank`` of a layer with these singular values (scaling included).

    ``kept`` are the kept directions, the first ones when None; ``width`` and ``loss`` are as in :class:`LayerReport`.
    """
    stays = (torch.arange(min(rank, len(values))) if kept is None else kept).to(values.device)
    dropped = values.index_fill(0, stays, 0.0)
    return LayerReport(
        layer=name,
        rank_before=len(values),
        rank_after=rank,
        energy_kept=energy_kept(torch.cat([values[stays], dropped]), len(stays)),
        predicted_error=float(dropped.norm()),
        singular_values=tuple(values.tolist()),
        width=width,
        loss=loss,
    )
