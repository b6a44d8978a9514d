"""One change of ranks in a run, for callbacks, checkpoints and rank_history.csv; and the progress of a schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from dynrank.change.greedy import LossChange
from dynrank.change.resize import LayerReport
from dynrank.errors import read_as

LOSS_FIELDS = tuple(part.name for part in fields(LossChange))
# Columns of rank_history.csv. The columns of the estimated change of the loss are empty without gates.
FIELDS = (
    *("step", "layer", "rank_before", "rank_after", "energy_kept", "predicted_error", "reason", "brought"),
    *LOSS_FIELDS,
)


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


@dataclass(frozen=True)
class Decision:
    """A change that is decided but not yet made."""

    stage: int
    reason: str


@dataclass
class Progress:
    """The progress of a schedule in a run, as a checkpoint stores it.

    Attributes:
        stage: index of the first stage that is not over.
        pending: the decided change that is not yet made; None if nothing is decided.
        history: every change, and every attempt that was undone.
        observed_step: step of the last validation.
        metrics: metrics of that validation; empty after a change, because they describe the weights before it.
    """

    stage: int = 0
    pending: Decision | None = None
    history: list[RankEvent] = field(default_factory=list)
    observed_step: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
