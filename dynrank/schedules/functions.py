"""Functions from the optimizer step to the rank, pure and small; and the stages that one of them stands for."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from math import cos, pi

from dynrank.errors import ConfigurationError, Count, Positive, Steps, validated_call
from dynrank.schedules.stage import Stage
from dynrank.targets import Exactly
from dynrank.triggers import At

RankFunction = Callable[[int], int]


def from_function(function: RankFunction, total_steps: int) -> list[Stage]:
    """The changes of ``function`` in a run of ``total_steps``, as stages; it is called once for each step.

    Raises:
        ConfigurationError: naming the first step at which it gives no rank.

    >>> [(stage.when.step, stage.to.rank) for stage in from_function(geometric(8, 2, every=10), 25)]
    [(0, 8), (10, 4), (20, 2)]
    """
    stages: list[Stage] = []
    before = None
    for step in range(total_steps):
        rank = function(step)
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ConfigurationError(
                f"a function from step to rank must give an int of at least 1, got {rank!r} at step {step}"
            )
        if rank != before:
            stages.append(Stage(At(step=step), Exactly(rank), key=f"the function at step {step}"))
        before = rank
    return stages


@validated_call()
def constant(rank: Count) -> RankFunction:
    """``rank`` at every step.

    >>> constant(8)(1000)
    8
    """
    return lambda step: rank


@validated_call()
def linear(start: Count, end: Count, steps: Count) -> RankFunction:
    """``start + (end - start) * step / steps``, rounded, and ``end`` from ``steps`` on.

    >>> [linear(8, 4, 4)(step) for step in range(6)]
    [8, 7, 6, 5, 4, 4]
    """
    return lambda step: round(start + (end - start) * min(1.0, step / steps))


@validated_call()
def cosine(start: Count, end: Count, steps: Count) -> RankFunction:
    """``end + (start - end) * (1 + cos(pi * step / steps)) / 2``, rounded, and ``end`` from ``steps`` on.

    >>> [cosine(32, 8, 4)(step) for step in range(6)]
    [32, 28, 20, 12, 8, 8]
    """
    return lambda step: round(end + (start - end) * (1 + cos(pi * min(1.0, step / steps))) / 2)


@validated_call()
def geometric(start: Count, end: Count, every: Count, factor: Positive = 0.5) -> RankFunction:
    """``start * factor ** (step // every)``, rounded, until ``end``.

    >>> [geometric(64, 8, every=10)(step) for step in (0, 9, 10, 20, 30, 99)]
    [64, 64, 32, 16, 8, 8]
    """
    bound = max if factor < 1 else min
    return lambda step: bound(end, round(start * factor ** (step // every)))


@validated_call()
def join(functions: Sequence[RankFunction], boundaries: Sequence[Steps]) -> RankFunction:
    """``functions[i]`` from step ``boundaries[i - 1]`` on; each counts its steps from its own start.

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
