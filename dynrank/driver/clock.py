"""When the stages of a schedule are due by time: at a fixed step, epoch or share of the run, or at a deadline."""

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
        """Whether stage ``index`` may wait no longer: for its deadline, for a later stage, or for a time long past.

        A stage at a fixed time waits ``patience`` steps, and no longer than the run took up to that time.
        """
        planned, later = self._planned[index], self._planned[index + 1 :]
        if any(at is not None and at <= step + 1 for at in later):
            return True
        waits = min(patience, planned or 0) if isinstance(self._stages[index].when, At) else 0
        return planned is not None and planned + waits <= step

    def due(self, first: int, step: int, *, ended: bool) -> int | None:
        """The last stage from ``first`` on whose time has come, which ends those before it; None if there is none.

        ``ended``: training is over, perhaps earlier than was foreseen.
        """
        for index in reversed(range(first, len(self._stages))):
            if self.has_come(index, step) or (ended and self._stages[index].when == At(fraction=1.0)):
                return index
        return None

    def coming(self, first: int, step: int) -> Iterator[tuple[int, int]]:
        """(index, planned step) of the stages after ``step``; of those that share a step, only the last one acts."""
        planned = {self._planned[index]: index for index in range(first, len(self._stages))}
        yield from ((index, at) for at, index in planned.items() if at is not None and at > step)
