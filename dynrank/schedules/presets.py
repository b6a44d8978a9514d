"""Schedules by name. Every argument is a key of the file of the same name in conf/schedule/.

A preset returns new stages at each call, with a trigger of their own each: a trigger that is given is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field

from dynrank.errors import ConfigurationError, Count, NotNegative, Share, validated_call
from dynrank.schedules.stage import Stage
from dynrank.targets import Budget, Energy, Factor, GrowTo, Rank, Smallest, Target, Towards
from dynrank.triggers import At, Plateau, Trigger

Changes = Annotated[int, Field(ge=1, le=1000)]  # each is a stage: 1000 are far more than there are ranks to go through
Time = Annotated[float, Field(ge=0, le=1)]  # share of the run
Shape = Literal["geometric", "linear", "cosine"]


def _once(trigger: Trigger | At | None, target: Target, deadline: float | None, *, key: str) -> Stage:
    """A stage with a trigger of its own (a plateau if None); a fixed time needs no deadline."""
    when = Plateau() if trigger is None else deepcopy(trigger)
    return Stage(when, target, None if isinstance(when, At) else deadline, key=key)


def _down_to(rank: int, shared: bool, step: int, steps: int, shape: Shape = "geometric") -> Target:
    """Step ``step`` of ``steps`` on the way to ``rank`` for every layer, or to one pool of as many parameters."""
    return Budget(rank=rank, left=steps - step) if shared else Towards(rank, step, steps, shape)


def fixed() -> list[Stage]:
    """The rank stays as it starts."""
    return []


@validated_call("schedule")
def stages(stages: Sequence[Stage]) -> list[Stage]:
    """Stages as they are given, for schedules written out in a configuration file."""
    return [
        stage if stage.key != "schedule.stages" else replace(stage, key=f"schedule.stages[{i}]")
        for i, stage in enumerate(stages)
    ]


@validated_call("schedule")
def one_stage(
    trigger: Trigger | At, target: Target, deadline: Share | None = None, repeat: bool = False
) -> list[Stage]:
    """Any trigger with any target; a deadline beside a fixed time has no effect."""
    return [replace(_once(trigger, target, deadline, key="schedule.target"), repeat=repeat)]


@validated_call("schedule")
def after_convergence(
    final_rank: Count,
    trigger: Trigger | At | None = None,
    *,
    shared: bool = False,
    drops: Changes = 1,
    deadline: Share | None = 0.75,
) -> list[Stage]:
    """Down to ``final_rank`` once training has converged, in ``drops`` equal factors.

    Args:
        final_rank: rank to end at.
        trigger: when; :class:`dynrank.triggers.Plateau` when None.
        shared: to one pool of as many parameters for all layers, instead of to that rank in each.
        drops: changes to get there (64 -> 8 in 3: 32, 16, 8).
        deadline: share of the run at which the final rank is taken in any case; None: never.
    """
    return [
        _once(trigger, _down_to(final_rank, shared, step, drops), deadline, key="schedule.final_rank")
        for step in range(1, drops + 1)
    ]


@validated_call("schedule")
def milestones(
    ranks: Sequence[Count],
    at: Sequence[NotNegative],
    unit: Literal["fraction", "step", "epoch"] = "fraction",
    *,
    shared: bool = False,
) -> list[Stage]:
    """``ranks[i]`` from ``at[i]`` on, counted in ``unit``: "fraction" of the run, "step" or "epoch".

    ``shared``: as one pool of the parameters of ``ranks[i]``.
    """
    if len(ranks) != len(at) or not ranks:
        raise ConfigurationError(
            f"ranks and at must be lists of one length, got {ranks!r} and {at!r}; set schedule.ranks and schedule.at"
        )
    if sorted(at) != list(at) or (unit == "fraction" and at[-1] > 1):
        raise ConfigurationError(
            f"at must be ascending, and at most 1 as fractions, got {list(at)}; set schedule.at or schedule.unit"
        )
    if unit == "fraction":
        times = [At(fraction=share) for share in at]
    elif all(time == int(time) for time in at):
        times = [At(step=int(time)) if unit == "step" else At(epoch=int(time)) for time in at]
    else:
        raise ConfigurationError(f"at must be whole numbers of {unit}s, got {list(at)}; set schedule.at")
    return [
        Stage(time, Budget(rank=rank) if shared else Rank(rank), key=f"schedule.ranks[{i}]")
        for i, (time, rank) in enumerate(zip(times, ranks, strict=True))
    ]


@validated_call("schedule")
def halving_on_plateau(
    final_rank: Count, trigger: Trigger | None = None, *, factor: Share = 0.5, deadline: Share | None = 0.75
) -> list[Stage]:
    """Half the rank on every plateau, down to ``final_rank``, which is taken in any case at the deadline."""
    halving = _once(trigger, Factor(factor, lowest=final_rank), None, key="schedule.final_rank")
    repeated = [replace(halving, repeat=True)]
    if deadline is None:
        return repeated
    return [*repeated, Stage(At(fraction=deadline), Rank(final_rank), key="schedule.final_rank")]


@validated_call("schedule")
def anneal(
    final_rank: Count,
    *,
    steps: Changes = 4,
    start: Time = 0.2,
    end: Time = 0.8,
    shape: Shape = "geometric",
    shared: bool = False,
) -> list[Stage]:
    """From the starting rank to ``final_rank`` in ``steps`` changes at equal distances (LoRA-Squeeze in-tuning).

    Args:
        final_rank: rank to end at.
        steps: changes.
        start: share of the run at the first change.
        end: share of the run at the last.
        shape: "geometric" (64, 32, 16, 8), "linear" or "cosine".
        shared: to pools of as many parameters for all layers; geometric only.

    Source: arXiv:2602.10993.
    """
    if shared and shape != "geometric":
        raise ConfigurationError(
            f"a shared pool falls by equal factors, got shape={shape!r}; set schedule.shape=geometric"
        )
    if start > end:
        raise ConfigurationError(
            f"start must be at most end = {end:g}, got {start:g}; set schedule.start or schedule.end"
        )
    times = [start + (end - start) * i / max(1, steps - 1) for i in range(steps)]
    return [
        Stage(At(fraction=time), _down_to(final_rank, shared, i, steps, shape), key="schedule.final_rank")
        for i, time in enumerate(times, 1)
    ]


@validated_call("schedule")
def squeeze_at_end(final_rank: Count, *, shared: bool = False) -> list[Stage]:
    """Train at the starting rank, and squeeze after the last step (LoRA-Squeeze post-tuning, arXiv:2602.10993).

    ``shared``: to one pool of the parameters of ``final_rank``.
    """
    return [Stage(At(fraction=1.0), _down_to(final_rank, shared, 1, 1), key="schedule.final_rank")]


@validated_call("schedule")
def squeeze_then_tune(
    final_rank: Count, *, tune: Annotated[float, Field(gt=0, lt=1)] = 0.1, shared: bool = False
) -> list[Stage]:
    """Squeeze, then train the last share ``tune`` of the run (LoRA-Squeeze continued tuning, arXiv:2602.10993).

    ``shared``: to one pool of the parameters of ``final_rank``.
    """
    return [Stage(At(fraction=1 - tune), _down_to(final_rank, shared, 1, 1), key="schedule.final_rank")]


@validated_call("schedule")
def energy(
    share: Share,
    trigger: Trigger | At | None = None,
    *,
    lowest: Count = 1,
    multiple: Count = 1,
    deadline: Share | None = 0.75,
) -> list[Stage]:
    """Each layer to the rank that keeps ``share`` of its energy (sum of squared singular values), once converged."""
    return [_once(trigger, Energy(share, lowest=lowest, multiple=multiple), deadline, key="schedule.lowest")]


@validated_call("schedule")
def budget(
    share: Share | None = None,
    parameters: Count | None = None,
    trigger: Trigger | At | None = None,
    *,
    final_rank: Count | None = None,
    bytes: ByteSize | None = None,
    lowest: Count = 1,
    highest: Count | None = None,
    multiple: Count = 1,
    deadline: Share | None = 0.75,
) -> list[Stage]:
    """All layers to ranks that share one pool of parameters, once converged; sizes as in :func:`early_budget`."""
    pool = _pool(final_rank, share, parameters, bytes, lowest=lowest, highest=highest, multiple=multiple)
    return [_once(trigger, pool, deadline, key="schedule.lowest, schedule.share")]


@validated_call("schedule")
def early_budget(
    final_rank: Count | None = None,
    *,
    share: Share | None = None,
    parameters: Count | None = None,
    bytes: ByteSize | None = None,
    at: Time = 0.3333,
    lowest: Count = 1,
    highest: Count | None = None,
    multiple: Count = 1,
) -> list[Stage]:
    """All layers to ranks that share one pool of parameters, early in the run.

    Its file in conf/schedule/ cuts by gates, raises the adapter's rate afterwards (by two for a quarter of the rank: a
    step moves the update as far as before) and has no ramp; in Python these are
    ``How(metric="gates", rate_after="sqrt")``.

    Args:
        final_rank: the pool has as many parameters as this rank; used where none of the next three is given.
        share: of the parameters before the change.
        parameters: of all layers together.
        bytes: of all layers together in float32: 8388608, or "8MiB".
        at: share of the run at which the ranks change.
        lowest: rank that every layer keeps.
        highest: rank that no layer exceeds; None: its rank now.
        multiple: of which new ranks are multiples.
    """
    pool = _pool(final_rank, share, parameters, bytes, lowest=lowest, highest=highest, multiple=multiple)
    return [Stage(At(fraction=at), pool, key="schedule.final_rank, schedule.share")]


@validated_call("schedule")
def auto(
    tolerance: NotNegative = 0.01,
    *,
    at: Time = 0.3333,
    check_batches: Count | None = None,
    lowest: Count = 1,
    highest: Count | None = None,
    multiple: Count = 1,
) -> list[Stage]:
    """The smallest adapter that validates as well as the uncut one: early in the run, and again after the last step.

    Its file in conf/schedule/ has the ``How`` of that of :func:`early_budget`.

    Args:
        tolerance: largest relative worsening of ``How.check_monitor`` by each of the two cuts.
        at: share of the run at the first one.
        check_batches: of validation data that each trial validates; None: all.
        lowest: rank that every layer keeps.
        highest: rank that no layer exceeds; None: its rank now.
        multiple: of which new ranks are multiples.
    """
    smallest = Smallest(tolerance, check_batches=check_batches, lowest=lowest, highest=highest, multiple=multiple)
    return [Stage(At(fraction=share), smallest, key="schedule.lowest") for share in (at, 1.0)]


def _pool(
    final_rank: int | None, share: float | None, parameters: int | None, bytes: ByteSize | None, **bounds: Any
) -> Budget:
    """The budget of the one size that is given; ``final_rank`` is the default of the others."""
    others = (share, parameters, bytes) != (None, None, None)
    return Budget(parameters, share, rank=None if others else final_rank, bytes=bytes, **bounds)


@validated_call("schedule")
def grow(final_rank: Count, trigger: Trigger | At | None = None, *, deadline: Share | None = 0.5) -> list[Stage]:
    """Up to ``final_rank`` without changing the function: when training at the starting rank has converged."""
    return [_once(trigger, GrowTo(final_rank), deadline, key="schedule.final_rank")]


@validated_call("schedule")
def grow_then_shrink(
    peak_rank: Count,
    final_rank: Count,
    *,
    grow_at: Share = 0.2,
    trigger: Trigger | At | None = None,
    deadline: Share | None = 0.8,
) -> list[Stage]:
    """Up to ``peak_rank`` at the share ``grow_at`` of the run, then down to ``final_rank`` once it has converged."""
    up = Stage(At(fraction=grow_at), GrowTo(peak_rank), key="schedule.peak_rank")
    return [up, *after_convergence(final_rank, trigger, deadline=deadline)]
