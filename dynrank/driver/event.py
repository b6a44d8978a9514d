"""One change of ranks in a run, for callbacks, checkpoints and rank_history.csv; and the progress of a schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dynrank.change.resize import LayerReport
from dynrank.errors import read_as

# Columns of rank_history.csv.
FIELDS = ("step", "layer", "rank_before", "rank_after", "energy_kept", "predicted_error", "reason", "brought")


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
