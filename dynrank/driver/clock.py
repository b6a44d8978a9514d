"""When the stages of a schedule are due by time: at a fixed step, epoch or share of the run, or at a deadline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dynrank.schedules import Stage
from dynrank.triggers import At, Run


class Clock:
    """The step by which each stage acts at the latest, in a run of known or unknown length.

    Args:
        stages: of the schedule.
        run: its length.

    Raises:
        ConfigurationError: if a stage's time needs a length that nobody knows.
    """

    def __init__(self, stages: Sequence[Stage], run: Run) -> None:
        self.total_steps = run.total_steps
        self._stages = stages
        self._planned = [stage.planned_step(run) for stage in stages]

    def has_come(self, index: int, step: int) -> bool:
        """Whether the latest time of stage ``index`` is ``step`` or earlier."""
        planned = self._planned[index]
        return planned is not None and planned <= step

    def due(self, first: int, step: int, *, ended: bool) -> int | None:
        """The last stage from ``first`` on whose time has come, which ends those before it; None if there is none.

        Args:
            first: index of the first stage that is not over.
            step: optimizer steps made.
            ended: whether training is over, perhaps earlier than was foreseen.
        """
        for index in reversed(range(first, len(self._stages))):
            if self.has_come(index, step) or (ended and self._stages[index].when == At(fraction=1.0)):
                return index
        return None

    def coming(self, first: int, step: int) -> Iterator[tuple[int, int]]:
        """(index, planned step) of the stages after ``step``; of those that share a step, only the last one acts."""
        planned = {self._planned[index]: index for index in range(first, len(self._stages))}
        yield from ((index, at) for at, index in planned.items() if at is not None and at > step)

    def reason(self, index: int) -> str:
        """Why stage ``index`` acts, when its time has come."""
        stage = self._stages[index]
        return stage.when.reason if isinstance(stage.when, At) else f"deadline of {stage.deadline:g} of the run"
