"""One change of ranks in a run, as it is told, stored and written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dynrank.change.greedy import LossChange
from dynrank.change.report import LayerReport
from dynrank.errors import read_as

LOSS_FIELDS = tuple(field.name for field in fields(LossChange))
# Columns of rank_history.csv. Those of the estimated change of the loss are empty where no gates were watched.
FIELDS = ("step", "layer", "rank_before", "rank_after", "energy_kept", "predicted_error", "reason", *LOSS_FIELDS)


@dataclass(frozen=True)
class RankEvent:
    """One change of ranks.

    Attributes:
        step: optimizer steps made before it.
        reason: why it was made, or why it was undone.
        layers: what it did to each layer that it changed.
        undone: it cost too much and was taken back; the ranks are as before.
    """

    step: int
    reason: str
    layers: tuple[LayerReport, ...]
    undone: bool = False

    @property
    def loss(self) -> LossChange | None:
        """The estimated change of the loss, of all layers together; None where no gates were watched."""
        parts = [layer.loss for layer in self.layers if layer.loss is not None]
        return LossChange(*(sum(getattr(part, name) for part in parts) for name in LOSS_FIELDS)) if parts else None

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> RankEvent:
        """The event from which ``dataclasses.asdict`` made ``state``; ConfigurationError if that is damaged."""
        return read_as(cls, state, "ckpt_path")
