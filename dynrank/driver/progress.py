"""The progress of a schedule in a run, as a checkpoint stores it."""

from __future__ import annotations

from dataclasses import dataclass, field

from dynrank.driver.event import RankEvent


@dataclass(frozen=True)
class Decision:
    """A change that is decided but not yet made."""

    stage: int
    reason: str


@dataclass
class Progress:
    """How far a schedule is.

    Attributes:
        stage: index of the first stage that is not over.
        pending: the decided change that is not yet made; None if nothing is decided.
        history: every change, and every attempt that was undone.
        observed_step: step of the last validation.
    """

    stage: int = 0
    pending: Decision | None = None
    history: list[RankEvent] = field(default_factory=list)
    observed_step: int | None = None
