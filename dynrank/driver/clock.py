"""When a stage is due by time: at a fixed step, epoch or share of the run, or at its deadline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dynrank.schedules import Stage
from dynrank.triggers import At, Run


class Clock:
    """The step by which each stage acts at the latest."""

    def __init__(self, stages: Sequence[Stage], run: Run) -> None:
        self._stages, self._planned = stages, [stage.planned_step(run) for stage in stages]

    def has_come(self, index: int, step: int) -> bool:
        """Whether the latest time of stage ``index`` is ``step`` or earlier."""
        planned = self._planned[index]
        return planned is not None and planned <= step

    def is_last_moment(self, index: int, step: int, patience: int) -> bool:
        """Whether stage ``index`` may wait no longer, because of its own time or because a later stage is due.

        A stage with a fixed time may wait up to ``patience`` more steps, but no more steps than came before that time.
        """
        planned, later = self._planned[index], self._planned[index + 1 :]
        if any(at is not None and at <= step + 1 for at in later):
            return True
        waits = min(patience, planned or 0) if isinstance(self._stages[index].when, At) else 0
        return planned is not None and planned + waits <= step

    def due(self, first: int, step: int, *, ended: bool) -> int | None:
        """Index of the last due stage, from ``first`` on; it replaces the stages before it. None if no stage is due.

        ``ended``: training is over, perhaps before its planned end.
        """
        for index in reversed(range(first, len(self._stages))):
            if self.has_come(index, step) or (ended and self._stages[index].when == At(fraction=1.0)):
                return index
        return None

    def coming(self, first: int, step: int) -> Iterator[tuple[int, int]]:
        """(index, planned step) of the stages after ``step``; if several share a step, only the last one."""
        planned = {self._planned[index]: index for index in range(first, len(self._stages))}
        yield from ((index, at) for at, index in planned.items() if at is not None and at > step)
