"""The progress of a schedule in a run, as a checkpoint stores it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dynrank.driver.event import RankEvent
from dynrank.errors import ConfigurationError, described, read_as
from dynrank.rank_map import RankBounds
from dynrank.schedules import Stage
from dynrank.schedules.stage import as_texts
from dynrank.triggers import Trigger


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
        awaits_validation: whether none came since the last change that has lowered ranks.
    """

    stage: int = 0
    pending: Decision | None = None
    history: list[RankEvent] = field(default_factory=list)
    observed_step: int | None = None
    awaits_validation: bool = False


def state_of(progress: Progress, stages: Sequence[Stage], rules: Mapping[str, RankBounds]) -> dict[str, Any]:
    """What a checkpoint has of a schedule, in plain containers."""
    return {
        "progress": asdict(progress),
        "stages": [text[:2] for text in as_texts(stages)],
        "rank_map": [(key, described(rule)) for key, rule in rules.items()],
        "triggers": [stage.when.state_dict() if isinstance(stage.when, Trigger) else None for stage in stages],
    }


def load(state: Mapping[str, Any], stages: Sequence[Stage], rules: Mapping[str, RankBounds]) -> Progress:
    """The progress in a ``state``, whose triggers' states go into ``stages``.

    Raises:
        ConfigurationError: if the checkpoint is of another version, or of a schedule with other times, triggers or
            targets, or of another rank map.
    """
    mine = state_of(Progress(), stages, rules)
    absent = sorted(mine.keys() - state.keys())
    if absent:
        raise ConfigurationError(
            f"the checkpoint has no {', '.join(absent)} of a rank schedule, so it was made without one, or by another "
            "version of dynrank; resume from another one, or begin a new run",
            *("ckpt_path", "resume_from_checkpoint"),
        )
    for part in ("stages", "rank_map"):
        theirs = [tuple(texts) for texts in state[part]]
        if theirs != mine[part]:
            raise ConfigurationError(
                f"the checkpoint was made under another schedule or rank_map: its {part} are {theirs}, here they are "
                f"{mine[part]}; give both as they were, or begin a new run with the adapter",
                *("schedule", "rank_map"),
            )
    for stage, saved in zip(stages, state["triggers"], strict=True):
        if isinstance(stage.when, Trigger):
            stage.when.load_state_dict(saved)
    return read_as(Progress, dict(state["progress"]), "the checkpoint")
