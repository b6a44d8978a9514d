"""The search for the smallest adapter within a tolerance: a bisection, in which each trial is a validation."""

from __future__ import annotations

from bisect import bisect_left
from functools import partial

from dynrank.change.interrupts import uninterrupted
from dynrank.change.reports import LayerReport
from dynrank.distributed.processes import from_first
from dynrank.driver.due import DueStage
from dynrank.driver.event import Measured, RankEvent
from dynrank.driver.trial import Trial
from dynrank.targets import Budget


def cut_to_smallest(trial: Trial, due: DueStage) -> RankEvent | None:
    """Cut to the fewest directions that are enough; the event is undone if all are needed. None: nothing to cut.

    The cut is within the tolerance; with one step less it was not. A still smaller number of steps could pass by
    chance; it is not tried. If the bounds of the budget allow no cut within the tolerance, the one that keeps all that
    they allow is made. A layer of no importance keeps its rank where no such cut is within the tolerance.

    Args:
        trial: the cuts are made inside it.
        due: a stage with ``search``, which is the last one; its ``max_regression`` is the tolerance.
    """
    search = Search(trial, due)
    if search.ranks(0) == search.now:
        return None
    steps = search.fewest_steps()
    measured, reports = search.tried(steps)
    passes = search.passes(steps)
    if passes:
        change = due.change(partial(search.ranks, steps))
        with uninterrupted():
            change.apply()
    left = sum(search.ranks(steps).values())
    allowed = f"{due.stage.how.max_regression:.2%} allowed"
    reason = f"{due.reason}: {left:,} of {sum(search.now.values()):,} directions, {allowed}"
    return due.event(reports, reason, measured, undone=not passes)


class Search:
    """Trials of cuts that take different numbers of steps up from the lowest ranks; the arguments are as above.

    Attributes:
        now: {layer: its rank now}.
    """

    def __init__(self, trial: Trial, due: DueStage) -> None:
        self._trial = trial
        self._due = due
        self.now = due.layers.ranks
        # By their number of steps.
        self._tried: dict[int, tuple[Measured, list[LayerReport]]] = {}
        # The order has (layer, its next rank) for each step up from the lowest ranks.
        self._lowest, self._order, self._keeps_all = from_first(self._plan, due.training.group)

    def _plan(self) -> tuple[dict[str, int], list[tuple[str, int]], bool]:
        target = self._due.stage.to
        assert isinstance(target, Budget)
        states = self._due.states()
        largest = target.ranks(states)
        lowest = target.lowest_ranks(states)
        order = target.order(states)
        spans = zip(lowest.items(), target.highest_ranks(states).values(), strict=True)
        # A layer of no importance has no steps, and all of the others' need not keep what it has learned.
        keeps_all = all(name in dict(order) or low == high for (name, low), high in spans)
        return lowest, [step for step in order if step[1] <= largest[step[0]]], keeps_all

    def ranks(self, steps: int) -> dict[str, int]:
        """The rank of every layer after so many steps."""
        return self.now | self._lowest | dict(self._order[:steps])

    def passes(self, steps: int) -> bool:
        """Whether a cut to so many steps is allowed; a cut to all of them may keep all directions that may be kept."""
        return (self._keeps_all and steps == len(self._order)) or self._trial.allows(self.tried(steps)[0].after)

    def fewest_steps(self) -> int:
        """The fewest steps that pass and cut at all, or the most steps that cut and do not pass."""
        fewest = bisect_left(range(len(self._order)), True, key=self.passes)
        return fewest if self.ranks(fewest) != self.now else fewest - 1

    def tried(self, steps: int) -> tuple[Measured, list[LayerReport]]:
        """What a cut to so many steps costs, which was made, validated, and undone bit for bit, and its reports."""
        if steps not in self._tried:
            change = self._due.change(partial(self.ranks, steps))
            self._tried[steps] = self._trial.make(change), change.reports
            self._trial.restore()
        return self._tried[steps]
