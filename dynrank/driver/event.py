"""One change of ranks in a run, for callbacks, checkpoints and rank_history.csv."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dynrank.change.greedy import LossChange
from dynrank.change.resize import LayerReport
from dynrank.errors import read_as

LOSS_FIELDS = tuple(field.name for field in fields(LossChange))
# Columns of rank_history.csv. The columns of the estimated change of the loss are empty without gates.
FIELDS = ("step", "layer", "rank_before", "rank_after", "energy_kept", "predicted_error", "reason", *LOSS_FIELDS)


@dataclass(frozen=True)
class RankEvent:
    """One change of ranks.

    Attributes:
        step: optimizer steps made before the change.
        reason: why the change was made, or why it was undone.
        layers: a report for each changed layer.
        undone: whether the change cost too much and was undone; then the ranks are as before.
    """

    step: int
    reason: str
    layers: tuple[LayerReport, ...]
    undone: bool = False

    @property
    def loss(self) -> LossChange | None:
        """The estimated change of the loss, summed over all layers; None without gates."""
        parts = [layer.loss for layer in self.layers if layer.loss is not None]
        return LossChange(*(sum(getattr(part, name) for part in parts) for name in LOSS_FIELDS)) if parts else None

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> RankEvent:
        """The event whose ``dataclasses.asdict`` is ``state``; ConfigurationError if ``state`` is damaged."""
        return read_as(cls, state, "ckpt_path")
