"""What a change of ranks does to each layer, and what its directions are worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dynrank.change.gates import Gates
from dynrank.change.greedy import LossChange
from dynrank.errors import diverged
from dynrank.layers.ranked import RankedLayer
from dynrank.linalg import energy_kept, pooled, singular_values


@dataclass(frozen=True)
class LayerReport:
    """What a change of rank does to one layer.

    Attributes:
        layer: its name in the model.
        rank_before: rank before the change.
        rank_after: rank after it.
        energy_kept: share of the energy (sum of squared singular values) that stays, in [0, 1].
        predicted_error: norm of the dropped singular values: the Frobenius norm of the update's change.
        singular_values: of the update before the change (scaling included), descending.
        width: d_out + d_in (times the experts), the parameters of one direction.
        loss: the layer's part in the estimated change of the loss; None where no gates were watched.
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
        """Trainable numbers that go away (negative for growth)."""
        return (self.rank_before - self.rank_after) * self.width


@torch.no_grad()
def spectra(layers: Mapping[str, RankedLayer], gates: Gates | None = None) -> dict[str, Tensor]:
    """What each layer's directions are worth, (rank,) float64, descending.

    Singular values of its update, scaling included; with ``gates``, what they are worth to the loss (see
    :meth:`dynrank.change.greedy.Quadratic.values`).
    """
    if gates is not None:
        values = gates.values()
        return {name: values[name] for name in layers}
    found = {}
    for name, layer in layers.items():
        try:
            found[name] = pooled([singular_values(b, a) for b, a in layer.products()]) * layer.scaling
        except ValueError as error:
            raise diverged(name, error) from error
    return found


def report_of(
    name: str, rank: int, values: Tensor, width: int, kept: Tensor | None = None, loss: LossChange | None = None
) -> LayerReport:
    """The report of a change to ``rank``, of a layer with these singular values (scaling included), one per direction.

    ``kept`` are the directions that stay, the first ones when None; ``width`` and ``loss`` as in :class:`LayerReport`.
    """
    stays = (torch.arange(min(rank, len(values))) if kept is None else kept).to(values.device)
    gone = values.index_fill(0, stays, 0.0)
    return LayerReport(
        layer=name,
        rank_before=len(values),
        rank_after=rank,
        energy_kept=energy_kept(torch.cat([values[stays], gone]), len(stays)),
        predicted_error=float(gone.norm()),
        singular_values=tuple(values.tolist()),
        width=width,
        loss=loss,
    )
