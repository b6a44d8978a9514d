"""Which stage of a schedule is due by time: the steps at which stages act at the latest."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from dynrank.driver.progress import Decision
from dynrank.schedules import Stage
from dynrank.triggers import At, Run


class Timetable:
    """The times of the stages in a run of length ``run``.

    >>> from dynrank.targets import Rank
    >>> table = Timetable([Stage(At(step=3), Rank(4)), Stage(At(fraction=1.0), Rank(2))], Run(total_steps=9))
    >>> table.due(0, 2), table.due(0, 3), table.due(1, 9, ended=True)
    (None, Decision(stage=0, reason='step 3'), Decision(stage=1, reason='fraction 1'))
    """

    def __init__(self, stages: Sequence[Stage], run: Run) -> None:
        self._stages = stages
        # None: the stage has no time.
        self._steps = [stage.planned_step(run) for stage in stages]

    def next_step(self, first: int) -> float:
        """The first step at which a stage from number ``first`` on is due."""
        times = [self._time(index) for index in range(first, len(self._stages))]
        return min(times, default=inf)

    def due(self, first: int, step: int, *, ended: bool = False) -> Decision | None:
        """The last stage from number ``first`` on that is due at ``step``, which replaces those before it.

        ``ended``: no step follows, perhaps before the planned end.
        """
        for index in reversed(range(first, len(self._stages))):
            if self._time(index) <= step or (ended and self._is_at_end(index)):
                stage = self._stages[index]
                is_time = isinstance(stage.when, At)
                return Decision(index, stage.when.reason if is_time else f"deadline at {stage.deadline:.3g} of the run")
        return None

    def _time(self, index: int) -> float:
        planned = self._steps[index]
        # The run may be longer than it was thought to be.
        return inf if planned is None or self._is_at_end(index) else planned

    def _is_at_end(self, index: int) -> bool:
        return self._stages[index].when == At(fraction=1.0)
