"""Schedules by name: each is a function that returns stages.

Every call returns new stages, and every stage has its own trigger: a given trigger is copied.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Literal, TypeAlias

from pydantic import ByteSize, Field

from dynrank.errors import ConfigurationError, Count, NotNegative, Share, checked_call
from dynrank.schedules.stage import TO, How, Stage
from dynrank.targets import Budget, Energy, GrowTo, Rank, Target, Towards, Unchanged
from dynrank.triggers import At, Plateau, Trigger

# A function that returns stages, such as a preset, is a schedule too: LightningCLI builds these from YAML.
Schedule: TypeAlias = int | Stage | Sequence[Stage] | Callable[[], Sequence[Stage]]
"""A rank (``4`` is ``early_budget(4)``), a stage, a list of stages such as ``auto()``, or a function that makes one."""

# Each change is a stage. No adapter has as many as 1000 ranks to pass through.
Changes = Annotated[int, Field(ge=1, le=1000)]
# A share of the run.
Time = Annotated[float, Field(ge=0, le=1)]

# How changes are made by default, and how an early cut is.
PLAIN = How()
EARLY = How(lr_factor="sqrt")


def _once(trigger: Trigger | At | None, target: Target, deadline: float | None, how: How, argument: str) -> Stage:
    """A stage with this trigger (a plateau if None); a fixed time gets no deadline."""
    when = Plateau() if trigger is None else trigger
    return Stage(when, target, None if isinstance(when, At) else deadline, how=how, arguments=(argument,))


def fixed() -> list[Stage]:
    """No change: every layer keeps its starting rank.

    >>> fixed()
    []
    """
    return []


@checked_call
def rebalance(*, at: Time = 0.3333, how: How = PLAIN) -> list[Stage]:
    """Every layer keeps its rank, and gets balanced factors once, early in the run; the update stays the same.

    The two factors of each layer then have the same singular values, so an optimizer step changes the update about as
    much through one as through the other. A cut does this, too.

    Args:
        at: share of the run after which it happens.
        how: how the change is made.

    >>> (stage,) = rebalance()
    >>> stage.when, stage.to
    (At(fraction=0.3333), Unchanged())
    """
    return [Stage(At(fraction=at), Unchanged(), how=how, arguments=("at",))]


@checked_call
def stages(stages: Sequence[Stage]) -> list[Stage]:
    """The given stages, for a schedule that a configuration file lists stage by stage.

    >>> from dynrank.targets import Rank
    >>> first, second = stages([Stage(At(fraction=0.3), Rank(16)), Stage(At(fraction=0.6), Rank({"mlp": 8}))])
    >>> second.to
    Rank(rank={'mlp': 8})
    """
    return [
        stage if stage.arguments != TO else replace(stage, arguments=[f"stages[{i}].to"])
        for i, stage in enumerate(stages)
    ]


@checked_call
def early_budget(
    final_rank: Count | None = None,
    *,
    share: Share | None = None,
    parameters: Count | None = None,
    bytes: ByteSize | None = None,
    at: Time = 0.3333,
    lowest: Count = 1,
    highest: Count | None = None,
    how: How = EARLY,
) -> list[Stage]:
    """One cut of all layers to one shared pool of parameters, early in the run.

    Ranks are in proportion to the importance of each layer (see :class:`dynrank.targets.Budget`). Then the adapter's
    learning rate is multiplied by sqrt(mean rank before / after), so that an optimizer step changes the update as much
    as before.

    Args:
        final_rank: size of the pool: the parameters of this rank; unused if one of the next three is given.
        share: size of the pool as a share of the parameters before the cut.
        parameters: size of the pool in parameters of all layers together.
        bytes: size of the pool in bytes of float32: 8388608, or "8MiB".
        at: share of the run after which the cut comes.
        lowest: lowest rank of every layer.
        highest: highest rank of every layer; None: its rank now.
        how: how the change is made.

    >>> (stage,) = early_budget(4, highest=16)
    >>> stage.when
    At(fraction=0.3333)
    >>> stage.to.final_rank, stage.to.highest, stage.how.lr_factor
    (4, 16, 'sqrt')
    """
    if (share, parameters, bytes) != (None, None, None):
        final_rank = None
    pool = Budget(parameters, share, final_rank=final_rank, bytes=bytes, lowest=lowest, highest=highest)
    return [Stage(At(fraction=at), pool, how=how, arguments=(pool.size,))]


@checked_call
def auto(
    tolerance: NotNegative = 0.005,
    *,
    share: Share = 0.25,
    at: Time = 0.3333,
    lowest: Count = 1,
    highest: Count | None = None,
    how: How = EARLY,
) -> list[Stage]:
    """:func:`early_budget` to a ``share``, and after the last step the smallest adapter within a ``tolerance``.

    ``tolerance`` bounds only the second cut: it worsens the validated metric by no more than this, compared with the
    same run just before the cut. A bisection finds it with about log2(directions) validations of all validation data.

    Args:
        tolerance: largest relative worsening of ``how.check_monitor`` by the second cut. Below the noise of a
            validation, chance decides how far ranks fall.
        share: share of the parameters that the first cut keeps.
        at: share of the run after which the first cut comes.
        lowest: lowest rank of every layer.
        highest: highest rank of every layer; None: its rank now.
        how: how both changes are made.

    >>> cut, search = auto(tolerance=0.01)
    >>> cut.to.share, search.how.max_regression, search.search
    (0.25, 0.01, True)
    """
    first = early_budget(share=share, at=at, lowest=lowest, highest=highest, how=how)
    largest = Budget(share=1.0, lowest=lowest, highest=highest)
    how = replace(how, max_regression=tolerance)
    return [*first, Stage(At(fraction=1.0), largest, how=how, arguments=("lowest",), search=True)]


@checked_call
def after_convergence(
    final_rank: Count,
    trigger: Trigger | At | None = None,
    *,
    shared: bool = True,
    drops: Changes = 1,
    deadline: Share | None = 0.75,
    how: How = PLAIN,
) -> list[Stage]:
    """Cuts to ``final_rank`` when training has converged: ``drops`` cuts by equal factors.

    Args:
        final_rank: rank after the last cut.
        trigger: when each cut comes; :class:`dynrank.triggers.Plateau` when None.
        shared: whether all layers share one pool of as many parameters as ``final_rank`` has; False: each layer gets
            that rank.
        drops: how many cuts (64 -> 8 in 3: 32, 16, 8).
        deadline: share of the run at which the cuts come in any case; None: never.
        how: how each change is made.

    >>> (stage,) = after_convergence(4)
    >>> stage.when.monitor, stage.deadline
    ('val/loss', 0.75)
    """
    return [
        _once(trigger, _down_to(final_rank, shared, step, drops), deadline, how, "final_rank")
        for step in range(1, drops + 1)
    ]


@checked_call
def anneal(
    final_rank: Count,
    *,
    steps: Changes = 3,
    start: Time = 0.2,
    end: Time = 0.8,
    shared: bool = True,
    how: How = PLAIN,
) -> list[Stage]:
    """From the starting rank to ``final_rank`` in ``steps`` cuts by equal factors, at equal distances in time.

    Args:
        final_rank: rank after the last cut.
        steps: how many cuts (64 -> 8 in 3: 32, 16, 8).
        start: share of the run at the first cut.
        end: share of the run at the last cut.
        shared: as in :func:`after_convergence`.
        how: how each change is made.

    Source: LoRA-Squeeze, arXiv:2602.10993.

    >>> [round(stage.when.fraction, 2) for stage in anneal(4, steps=3)]
    [0.2, 0.5, 0.8]
    """
    if start > end:
        raise ConfigurationError(f"start must be at most end = {end:g}, got {start:g}", "start", "end")
    times = [start + (end - start) * i / max(1, steps - 1) for i in range(steps)]
    return [
        Stage(At(fraction=time), _down_to(final_rank, shared, i, steps), how=how, arguments=("final_rank",))
        for i, time in enumerate(times, 1)
    ]


def _down_to(rank: int, shared: bool, step: int, steps: int) -> Target:
    """Step ``step`` of ``steps`` to ``rank`` in every layer, or to one shared pool of as many parameters."""
    return Budget(final_rank=rank, left=steps - step) if shared else Towards(rank, step, steps)


@checked_call
def milestones(
    ranks: Sequence[Count],
    at: Sequence[NotNegative],
    unit: Literal["fraction", "step", "epoch"] = "fraction",
    *,
    shared: bool = False,
    how: How = PLAIN,
) -> list[Stage]:
    """Rank ``ranks[i]`` from time ``at[i]`` on.

    Args:
        ranks: the rank of every layer from each time on.
        at: the times, ascending.
        unit: unit of the times: "fraction" of the run (1 is after its last step), "step" or "epoch".
        shared: whether all layers share one pool of as many parameters as ``ranks[i]`` has.
        how: how each change is made.

    >>> [(stage.when.fraction, stage.to.rank) for stage in milestones([8, 4], at=[0.5, 0.75])]
    [(0.5, 8), (0.75, 4)]
    """
    if len(ranks) != len(at) or not ranks:
        raise ConfigurationError(f"ranks and at must have the same length, got {ranks!r} and {at!r}", "ranks", "at")
    if sorted(at) != list(at) or (unit == "fraction" and at[-1] > 1):
        raise ConfigurationError(
            f"at must be ascending, and at most 1 for fractions, got {list(at)} in the unit {unit!r}", "at", "unit"
        )
    if unit == "fraction":
        times = [At(fraction=share) for share in at]
    elif all(time == int(time) for time in at):
        times = [At(step=int(time)) if unit == "step" else At(epoch=int(time)) for time in at]
    else:
        raise ConfigurationError(f"at must be whole numbers of {unit}s, got {list(at)}", "at")
    return [
        Stage(time, Budget(final_rank=rank) if shared else Rank(rank), how=how, arguments=(f"ranks[{i}]",))
        for i, (time, rank) in enumerate(zip(times, ranks, strict=True))
    ]


@checked_call
def energy(
    share: Share = 0.9,
    trigger: Trigger | At | None = None,
    *,
    lowest: Count = 1,
    deadline: Share | None = 0.75,
    how: How = PLAIN,
) -> list[Stage]:
    """Each layer to the rank that keeps ``share`` of its energy (sum of squared singular values), on convergence.

    >>> (stage,) = energy(0.9)
    >>> stage.to
    Energy(share=0.9)
    """
    target = Energy(share, lowest=lowest)
    return [_once(trigger, target, deadline, how, "lowest")]


@checked_call
def grow(
    final_rank: Count, trigger: Trigger | At | None = None, *, deadline: Share | None = 0.5, how: How = PLAIN
) -> list[Stage]:
    """Growth to ``final_rank`` when training at the starting rank has converged; the function does not change.

    >>> (stage,) = grow(16)
    >>> stage.to
    GrowTo(rank=16)
    """
    return [_once(trigger, GrowTo(final_rank), deadline, how, "final_rank")]


def stages_of(schedule: object) -> list[Stage]:
    """The stages of any value that type ``Schedule`` allows."""
    if callable(schedule):
        schedule = schedule()
    if isinstance(schedule, int) and not isinstance(schedule, bool):
        return early_budget(schedule)
    if isinstance(schedule, Stage):
        return [schedule]
    if isinstance(schedule, list | tuple) and all(isinstance(stage, Stage) for stage in schedule):
        return list(schedule)
    made = "a rank, a stage or a list of stages, which early_budget(4) or auto() of dynrank.schedules make"
    raise ConfigurationError(f"a schedule must be {made}, got {schedule!r}", "schedule")
