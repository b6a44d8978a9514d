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
        "stages": as_texts(stages),
        "rank_map": _as_texts(rules),
        "triggers": [stage.when.state_dict() if isinstance(stage.when, Trigger) else None for stage in stages],
    }


def load(
    state: Mapping[str, Any], stages: Sequence[Stage], rules: Mapping[str, RankBounds]
) -> tuple[Progress, str | None]:
    """The progress in a ``state``, whose triggers' states go into ``stages``, and what applies from here on.

    Stages that are not over may differ from the checkpoint's; those of this schedule apply. So does the rank map, as
    long as no stage is over. The second value names which of the two differs; None: neither.

    Raises:
        ConfigurationError: if the checkpoint is of another schedule, rank map or version.
    """
    absent = sorted({*state_of(Progress(), stages, rules)} - state.keys())
    if absent:
        raise ConfigurationError(
            f"the checkpoint has no {', '.join(absent)} of a rank schedule, so another version of dynrank has made it; "
            "resume with that version, or begin a new run",
            "ckpt_path",
        )
    progress = read_as(Progress, dict(state["progress"]), "the checkpoint")
    mine = as_texts(stages)
    theirs = [tuple(stage) for stage in state["stages"]]
    my_rules = _as_texts(rules)
    their_rules = [tuple(rule) for rule in state["rank_map"]]
    # Stages that are over must have the same target; their times no longer matter.
    done, wanted = ([to for _, to, _ in texts[: progress.stage]] for texts in (theirs, mine))
    if done != wanted or (done and their_rules != my_rules):
        raise ConfigurationError(
            f"the checkpoint was made under another schedule or rank_map: its first stages went to {', '.join(done)} "
            f"by {their_rules}, here they go to {', '.join(wanted) or 'nothing'} by {my_rules}; give both as they "
            "were, only later stages may differ",
            *("schedule", "rank_map"),
        )
    for stage, now, before, saved in zip(stages, mine, theirs, state["triggers"], strict=False):
        if isinstance(stage.when, Trigger):
            stage.when.reset()
            if saved is not None and now[0] == before[0]:
                stage.when.load_state_dict(saved)
    # A decision stays if its stage has the same time or trigger.
    pending = progress.pending
    if pending is not None and (len(mine) <= pending.stage or mine[pending.stage][0] != theirs[pending.stage][0]):
        progress.pending = None
    return progress, "schedule" if theirs != mine else "rank_map" if their_rules != my_rules else None


def _as_texts(rules: Mapping[str, RankBounds]) -> list[tuple[str, str]]:
    """(pattern, what it says) of each rule of a rank map, in its order."""
    return [(key, described(rule)) for key, rule in rules.items()]
