"""Rank schedules: stages of when, to what and how, and the presets made of them.

A schedule is a list of :class:`Stage`, or a function from the optimizer step to a rank. Both are small and join: lists
with ``+``, functions with :func:`join`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import cos, isfinite, pi

from dynrank.errors import ConfigurationError
from dynrank.linalg import GAUGES
from dynrank.targets import Budget, Energy, Exactly, Factor, GrowTo, Rank, Target, Towards
from dynrank.triggers import At, Plateau, Run, Trigger

__all__ = [
    "How",
    "RankFunction",
    "Stage",
    "after_convergence",
    "anneal",
    "budget",
    "check_schedule",
    "constant",
    "cosine",
    "energy",
    "fixed",
    "from_function",
    "geometric",
    "grow",
    "grow_then_shrink",
    "halving_on_plateau",
    "join",
    "linear",
    "milestones",
    "one_stage",
    "squeeze_at_end",
    "squeeze_then_tune",
    "stages",
]

RankFunction = Callable[[int], int]
_METRICS = ("weight", "output", "loss")
_NEW_ROWS = ("orthogonal", "gradient")
_MOST_CHANGES = 1000  # of one preset, each a stage: far more than ranks to go through


@dataclass(frozen=True)
class How:
    """How a change of rank is made.

    Args:
        metric: what truncation minimises: "weight" (the update's Frobenius norm), "output" (of the layer, on the data
            seen) or "loss" (a Kronecker-factored estimate of its increase).
        window: optimizer steps before the change over which the statistics of the other two metrics (and of a budget by
            sensitivity, and of growth along the gradient) are collected; a change that cannot be foreseen is made this
            much later.
        gauge: of the new factors: "balanced", or "keep_norm" (A keeps the norm of its rows).
        rewarmup_steps: optimizer steps over which the learning rate is ramped up again after a change; 0: none.
        optimizer_state: "transport" carries the moments along, "reset" forgets them.
        new_rows: of A, in a growth: "orthogonal" to the old ones at random, or along the "gradient".
        max_regression: largest relative worsening of ``check_monitor`` by a change, measured by validations right
            before and after it; one that costs more is undone and tried again half as far. None: no check.
        check_monitor: name of the metric that is checked, smaller is better.

    Raises:
        ConfigurationError: if a value cannot be used.
    """

    metric: str = "weight"
    window: int = 20
    gauge: str = "balanced"
    rewarmup_steps: int = 0
    optimizer_state: str = "transport"
    new_rows: str = "orthogonal"
    max_regression: float | None = None
    check_monitor: str = "val/loss"

    def __post_init__(self) -> None:
        for name, known in (
            ("metric", _METRICS),
            ("gauge", GAUGES),
            ("optimizer_state", ("transport", "reset")),
            ("new_rows", _NEW_ROWS),
        ):
            if getattr(self, name) not in known:
                raise ConfigurationError(
                    f"{name} must be one of {known}, got {getattr(self, name)!r}; set schedule.{name}"
                )
        for name in ("window", "rewarmup_steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigurationError(f"{name} must be an int of at least 0, got {value!r}; set schedule.{name}")
        if self.max_regression is not None and not (_is_number(self.max_regression) and self.max_regression >= 0):
            raise ConfigurationError(
                f"max_regression must be a finite number of at least 0, or null, got {self.max_regression!r}; "
                "set schedule.max_regression"
            )
        if not isinstance(self.check_monitor, str) or not self.check_monitor:
            raise ConfigurationError(
                f"check_monitor must name a logged metric, got {self.check_monitor!r}; set schedule.check_monitor"
            )


@dataclass(frozen=True)
class Stage:
    """One change of ranks, or several of a kind.

    Args:
        when: a time, or a trigger that watches training.
        to: what ranks to change to.
        deadline: share of the run's optimizer steps, in (0, 1], at which the change comes in any case; None: never.
        repeat: act every time the trigger fires, until the target leaves all ranks as they are.
        how: None: as the scheduler says for all stages.
        key: configuration key that decides the target, for error messages.
    """

    when: Trigger | At
    to: Target
    deadline: float | None = None
    repeat: bool = False
    how: How | None = None
    key: str = "schedule.stages"

    def __post_init__(self) -> None:
        if not isinstance(self.when, Trigger | At):
            raise ConfigurationError(f"a stage's time must be a trigger, got {self.when!r}; set schedule.trigger")
        if not hasattr(self.to, "ranks"):
            raise ConfigurationError(
                f"a stage's target must be one of dynrank.targets, got {self.to!r}; set {self.key}"
            )
        if self.deadline is not None and (isinstance(self.when, At) or not _is_share(self.deadline)):
            raise ConfigurationError(
                f"deadline must be a share in (0, 1] or null, and null beside a fixed time, got {self.deadline!r}; "
                "set schedule.deadline"
            )
        if not isinstance(self.repeat, bool):
            raise ConfigurationError(f"repeat must be true or false, got {self.repeat!r}; set schedule.repeat")
        if self.repeat and isinstance(self.when, At):
            raise ConfigurationError(
                f"repeat must be false beside a fixed time, which comes once, got true and {self.when.reason}; "
                "set schedule.repeat or schedule.trigger"
            )

    def reach(self, low: int, high: int) -> tuple[int, int]:
        """Lowest and highest rank that a free layer of rank ``low`` to ``high`` may have after the stage."""
        reached = self.to.reach(low, high)
        while self.repeat and reached[0] < low:  # a growth that repeats is bounded by the layer's shape alone
            low, reached = reached[0], (self.to.reach(reached[0], high)[0], reached[1])
        return reached

    def planned_step(self, run: Run) -> int | None:
        """The optimizer step by which the stage acts at the latest; None if nothing bounds it."""
        if isinstance(self.when, At):
            return self.when.in_steps(run)
        return None if self.deadline is None else At(fraction=self.deadline).in_steps(run)

    @property
    def needs(self) -> frozenset[str]:
        """Which of "values" and "scores" the target reads."""
        return frozenset(self.to.needs)


def check_schedule(schedule: Sequence[Stage], how: How, *, highest: int, run: Run) -> list[tuple[int, int]]:
    """Refuse stages that contradict each other, the starting ranks or the length of the run.

    Args:
        schedule: its stages.
        how: of stages that have none of their own.
        highest: highest starting rank of all layers that may change.
        run: length of the run; what needs an unknown one is not checked.

    Returns:
        Lowest and highest rank after each stage, for a layer that starts at ``highest``.

    Raises:
        ConfigurationError: listing every contradiction with its stage and key.
    """
    faults, ranges = [], []
    low, before = highest, -1
    for number, stage in enumerate(schedule, 1):
        own = stage.how or how
        fault = stage.to.fault(highest)
        if fault:
            faults.append(f"stage {number}: {fault}; set {stage.key} or lora.rank")
        if own.window < 1 and (own.metric != "weight" or "scores" in stage.needs or own.new_rows == "gradient"):
            faults.append(
                f"stage {number}: window must be at least 1 step for metric={own.metric}, got 0; set schedule.window"
            )
        low, highest = stage.reach(low, highest)
        ranges.append((low, highest))
        if run.total_steps is None:
            continue
        in_epochs = isinstance(stage.when, At) and stage.when.epoch is not None
        planned = None if in_epochs and run.steps_per_epoch is None else stage.planned_step(run)
        if planned is None:
            continue
        warmup = getattr(stage.when, "warmup_steps", 0)
        if stage.deadline is not None and planned <= warmup:
            faults.append(
                f"stage {number}: deadline {stage.deadline:g} is step {planned}, within the warm-up of {warmup} steps; "
                "set schedule.deadline or schedule.trigger.warmup_steps"
            )
        if planned > run.total_steps:
            faults.append(f"stage {number}: step {planned} is after the run's last, {run.total_steps}; set {stage.key}")
        if planned < before:
            faults.append(f"stage {number}: step {planned} is before stage {number - 1}'s, {before}; set {stage.key}")
        before = max(before, planned)
    if faults:
        raise ConfigurationError("the schedule contradicts itself:\n  " + "\n  ".join(faults))
    return ranges


# Presets: every argument is a key of conf/schedule/.


def fixed() -> list[Stage]:
    """The rank stays as it starts."""
    return []


def stages(stages: Sequence[Stage]) -> list[Stage]:
    """Stages as they are given, for schedules written out in a configuration file."""
    for i, stage in enumerate(stages):
        if not isinstance(stage, Stage):
            raise ConfigurationError(
                f"a stage must be a dynrank.schedules.Stage, got {stage!r}; set schedule.stages[{i}]._target_"
            )
    return [
        stage if stage.key != "schedule.stages" else replace(stage, key=f"schedule.stages[{i}]")
        for i, stage in enumerate(stages)
    ]


def one_stage(
    trigger: Trigger | At, target: Target, deadline: float | None = None, repeat: bool = False
) -> list[Stage]:
    """Any trigger with any target; a deadline beside a fixed time has no effect."""
    return [Stage(trigger, target, _unless_timed(trigger, deadline), repeat, key="schedule.target")]


def after_convergence(
    final_rank: int, trigger: Trigger | At | None = None, *, drops: int = 1, deadline: float | None = 0.75
) -> list[Stage]:
    """Down to ``final_rank`` once training has converged, in ``drops`` equal factors.

    Args:
        final_rank: rank to end at.
        trigger: when; :class:`dynrank.triggers.Plateau` when None.
        drops: changes to get there (64 -> 8 in 3: 32, 16, 8).
        deadline: share of the run at which the final rank is taken in any case; None: never.
    """
    _check_count("final_rank", final_rank)
    _check_count("drops", drops, most=_MOST_CHANGES)
    when = Plateau() if trigger is None else trigger
    return [
        Stage(when, Towards(final_rank, step, drops), deadline=_unless_timed(when, deadline), key="schedule.final_rank")
        for step in range(1, drops + 1)
    ]


def milestones(ranks: Sequence[int], at: Sequence[float], unit: str = "fraction") -> list[Stage]:
    """``ranks[i]`` from ``at[i]`` on, counted in ``unit``: "fraction" of the run, "step" or "epoch"."""
    if not isinstance(ranks, list | tuple) or not isinstance(at, list | tuple) or len(ranks) != len(at) or not ranks:
        raise ConfigurationError(
            f"ranks and at must be lists of one length, got {ranks!r} and {at!r}; set schedule.ranks and schedule.at"
        )
    if unit not in ("fraction", "step", "epoch"):
        raise ConfigurationError(f"unit must be fraction, step or epoch, got {unit!r}; set schedule.unit")
    try:
        times = [At(**{unit: time}) for time in at]
    except ConfigurationError as error:
        raise ConfigurationError(f"at must be a list of times, got {at!r}: {error}; set schedule.at") from None
    if sorted(at) != list(at):
        raise ConfigurationError(f"at must be ascending, got {list(at)}; set schedule.at")
    for i, rank in enumerate(ranks):
        _check_count(f"ranks[{i}]", rank)
    return [
        Stage(time, Rank(rank), key=f"schedule.ranks[{i}]")
        for i, (time, rank) in enumerate(zip(times, ranks, strict=True))
    ]


def halving_on_plateau(
    final_rank: int, trigger: Trigger | None = None, *, factor: float = 0.5, deadline: float | None = 0.75
) -> list[Stage]:
    """Half the rank on every plateau, down to ``final_rank``, which is taken in any case at the deadline."""
    _check_count("final_rank", final_rank)
    if deadline is not None:
        _check_share("deadline", deadline)
    halving = Stage(trigger or Plateau(), Factor(factor, lowest=final_rank), repeat=True, key="schedule.final_rank")
    if deadline is None:
        return [halving]
    return [halving, Stage(At(fraction=deadline), Rank(final_rank), key="schedule.final_rank")]


def anneal(
    final_rank: int, *, steps: int = 4, start: float = 0.2, end: float = 0.8, shape: str = "geometric"
) -> list[Stage]:
    """From the starting rank to ``final_rank`` in ``steps`` changes at equal distances (LoRA-Squeeze in-tuning).

    Args:
        final_rank: rank to end at.
        steps: changes.
        start: share of the run at the first change.
        end: share of the run at the last.
        shape: "geometric" (64, 32, 16, 8), "linear" or "cosine".

    Source: arXiv:2602.10993.
    """
    _check_count("final_rank", final_rank)
    _check_count("steps", steps, most=_MOST_CHANGES)
    if not _is_number(start) or not _is_number(end) or not 0 <= start <= end <= 1:
        raise ConfigurationError(
            f"start and end must be shares, 0 <= start <= end <= 1, got {start!r} and {end!r}; "
            "set schedule.start or schedule.end"
        )
    times = [start + (end - start) * i / max(1, steps - 1) for i in range(steps)]
    return [
        Stage(At(fraction=time), Towards(final_rank, i, steps, shape), key="schedule.final_rank")
        for i, time in enumerate(times, 1)
    ]


def squeeze_at_end(final_rank: int) -> list[Stage]:
    """Train at the starting rank, and squeeze after the last step (LoRA-Squeeze post-tuning, arXiv:2602.10993)."""
    _check_count("final_rank", final_rank)
    return [Stage(At(fraction=1.0), Rank(final_rank), key="schedule.final_rank")]


def squeeze_then_tune(final_rank: int, *, tune: float = 0.1) -> list[Stage]:
    """Squeeze, then train the last share ``tune`` of the run (LoRA-Squeeze continued tuning, arXiv:2602.10993)."""
    _check_count("final_rank", final_rank)
    if not _is_share(tune) or tune == 1:
        raise ConfigurationError(f"tune must be a share in (0, 1), got {tune!r}; set schedule.tune")
    return [Stage(At(fraction=1 - tune), Rank(final_rank), key="schedule.final_rank")]


def energy(
    share: float,
    trigger: Trigger | At | None = None,
    *,
    lowest: int = 1,
    multiple: int = 1,
    deadline: float | None = 0.75,
) -> list[Stage]:
    """Each layer to the rank that keeps ``share`` of its energy (sum of squared singular values), once converged."""
    when = Plateau() if trigger is None else trigger
    return [
        Stage(
            when,
            Energy(share, lowest=lowest, multiple=multiple),
            deadline=_unless_timed(when, deadline),
            key="schedule.lowest",
        )
    ]


def budget(
    share: float | None = None,
    parameters: int | None = None,
    trigger: Trigger | At | None = None,
    *,
    lowest: int = 1,
    highest: int | None = None,
    multiple: int = 1,
    score: str = "energy",
    deadline: float | None = 0.75,
) -> list[Stage]:
    """All layers to ranks that share one pool of parameters (see :class:`dynrank.targets.Budget`), once converged."""
    when = Plateau() if trigger is None else trigger
    pool = Budget(parameters, share, lowest=lowest, highest=highest, multiple=multiple, score=score)
    return [Stage(when, pool, deadline=_unless_timed(when, deadline), key="schedule.lowest, schedule.share")]


def grow(final_rank: int, trigger: Trigger | At | None = None, *, deadline: float | None = 0.5) -> list[Stage]:
    """Up to ``final_rank`` without changing the function: when training at the starting rank has converged."""
    _check_count("final_rank", final_rank)
    when = Plateau() if trigger is None else trigger
    return [Stage(when, GrowTo(final_rank), deadline=_unless_timed(when, deadline), key="schedule.final_rank")]


def grow_then_shrink(
    peak_rank: int,
    final_rank: int,
    *,
    grow_at: float = 0.2,
    trigger: Trigger | At | None = None,
    deadline: float | None = 0.8,
) -> list[Stage]:
    """Up to ``peak_rank`` at the share ``grow_at`` of the run, then down to ``final_rank`` once it has converged."""
    _check_count("peak_rank", peak_rank)
    _check_share("grow_at", grow_at)
    up = Stage(At(fraction=grow_at), GrowTo(peak_rank), key="schedule.peak_rank")
    return [up, *after_convergence(final_rank, trigger, deadline=deadline)]


# Functions from the step to the rank.


def from_function(function: RankFunction, total_steps: int) -> list[Stage]:
    """The changes of ``function`` in a run of ``total_steps``, as stages; it's called once for each step.

    Raises:
        ConfigurationError: naming the first step at which it gives no rank.
    """
    ranks = [function(step) for step in range(total_steps)]
    for step, rank in enumerate(ranks):
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ConfigurationError(
                f"a function from step to rank must give an int of at least 1, got {rank!r} at step {step}"
            )
    changes = [step for step in range(total_steps) if step == 0 or ranks[step] != ranks[step - 1]]
    return [Stage(At(step=step), Exactly(ranks[step]), key=f"the function at step {step}") for step in changes]


def constant(rank: int) -> RankFunction:
    """Always ``rank``."""
    return lambda step: rank


def linear(start: int, end: int, steps: int) -> RankFunction:
    """From ``start`` to ``end`` in equal differences over ``steps`` steps, then ``end``.

    >>> [linear(8, 4, 4)(step) for step in range(6)]
    [8, 7, 6, 5, 4, 4]
    """
    _check_count("steps", steps)
    return lambda step: round(start + (end - start) * min(1.0, step / steps))


def cosine(start: int, end: int, steps: int) -> RankFunction:
    """From ``start`` to ``end`` along half a cosine wave over ``steps`` steps, then ``end``."""
    _check_count("steps", steps)
    return lambda step: round(end + (start - end) * (1 + cos(pi * min(1.0, step / steps))) / 2)


def geometric(start: int, end: int, every: int, factor: float = 0.5) -> RankFunction:
    """``start`` times ``factor`` after each ``every`` steps, until ``end``.

    >>> [geometric(64, 8, every=10)(step) for step in (0, 9, 10, 20, 30, 99)]
    [64, 64, 32, 16, 8, 8]
    """
    _check_count("every", every)
    bound = max if factor < 1 else min
    return lambda step: bound(end, round(start * factor ** (step // every)))


def join(functions: Sequence[RankFunction], boundaries: Sequence[int]) -> RankFunction:
    """Run ``functions[i]`` from step ``boundaries[i - 1]`` on; each counts its steps from its own start.

    >>> schedule = join([constant(32), constant(16)], boundaries=[100])
    >>> schedule(99), schedule(100)
    (32, 16)
    """
    if len(functions) != len(boundaries) + 1:
        raise ConfigurationError(
            f"functions must be one more than boundaries, got {len(functions)} and {len(boundaries)}"
        )
    if sorted(boundaries) != list(boundaries):
        raise ConfigurationError(f"boundaries must be ascending, got {list(boundaries)}")

    def schedule(step: int) -> int:
        index = bisect_right(boundaries, step)
        return functions[index](step - boundaries[index - 1] if index else step)

    return schedule


def _unless_timed(when: Trigger | At, deadline: float | None) -> float | None:
    if deadline is not None:
        _check_share("deadline", deadline)
    return None if isinstance(when, At) else deadline


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _is_share(value: float) -> bool:
    return _is_number(value) and 0 < value <= 1


def _check_share(name: str, value: float) -> None:
    if not _is_share(value):
        raise ConfigurationError(f"{name} must be a share in (0, 1], got {value!r}; set schedule.{name}")


def _check_count(name: str, value: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most is not None and value > most):
        bounds = "of at least 1" if most is None else f"between 1 and {most}"
        raise ConfigurationError(f"{name} must be an int {bounds}, got {value!r}; set schedule.{name}")
