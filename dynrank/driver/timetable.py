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
        self._at_end = [stage.when == At(fraction=1.0) for stage in stages]
        # A run may be longer than it was thought to be, so what is due at its end has no step.
        planned = [stage.planned_step(run) for stage in stages]
        timed = zip(planned, self._at_end, strict=True)
        self._steps = [inf if step is None or at_end else step for step, at_end in timed]

    def next_step(self, first: int) -> float:
        """The first step at which a stage from number ``first`` on is due."""
        return min(self._steps[first:], default=inf)

    def due(self, first: int, step: int, *, ended: bool = False) -> Decision | None:
        """The last stage from number ``first`` on that is due at ``step``, which replaces those before it.

        ``ended``: no step follows, perhaps before the planned end.
        """
        for index in reversed(range(first, len(self._stages))):
            if self._steps[index] <= step or (ended and self._at_end[index]):
                stage = self._stages[index]
                is_time = isinstance(stage.when, At)
                return Decision(index, stage.when.reason if is_time else f"deadline at {stage.deadline:.3g} of the run")
        return None
