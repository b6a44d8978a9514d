"""The search for the smallest adapter within a tolerance: a bisection, in which each trial is a validation."""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

from dynrank.change.change import Change
from dynrank.change.interrupts import uninterrupted
from dynrank.change.reports import LayerReport
from dynrank.distributed.processes import from_first
from dynrank.driver.due import DueStage
from dynrank.driver.event import UNDONE, Measured, RankEvent
from dynrank.driver.regression import RegressionTest
from dynrank.driver.training import Training
from dynrank.driver.undo import Undo
from dynrank.targets import Budget


def cut_to_smallest(training: Training, undo: Undo, due: DueStage, parameters_before: int) -> RankEvent | None:
    """Cut to the fewest directions that are enough; the event says "undone" if all are needed. None: nothing to cut.

    The cut is within the tolerance; with one step less it was not. A still smaller number of steps could pass by
    chance; it is not tried. If the bounds of the budget allow no cut within the tolerance, the one that keeps all that
    they allow is made.

    Args:
        training: after the last optimizer step.
        undo: the cuts are made inside it.
        due: a stage with ``search``, which is the last one; its ``max_regression`` is the tolerance.
        parameters_before: parameters of the adapters when the run began.
    """
    search = Search(training, undo, due)
    if search.ranks(0) == search.now:
        return None
    steps = search.fewest_steps()
    measured = search.measured(steps)
    found = search.result(steps, parameters_before)
    if search.passes(steps):
        change = search.compute(steps)
        with uninterrupted():
            change.apply()
        return due.event(training.step, change.reports, f"{due.reason}: {found}", measured)
    reason = f"{UNDONE}{found} ({due.reason})"
    return due.event(training.step, search.trials[steps].reports, reason, measured, undone=True)


class Trial(NamedTuple):
    """A cut that was made, validated, and undone bit for bit."""

    value: float
    reports: list[LayerReport]


class Search:
    """Trials of cuts that take different numbers of steps up from the lowest ranks; the arguments are as above.

    Attributes:
        now: {layer: its rank now}.
        trials: the trials so far, by their number of steps.
    """

    def __init__(self, training: Training, undo: Undo, due: DueStage) -> None:
        self._training = training
        self._undo = undo
        self._due = due
        self._how = due.stage.how
        self.now = {name: layer.rank for name, layer in due.layers.items()}
        self.trials: dict[int, Trial] = {}
        # The order has (layer, its next rank) for each step up from the lowest ranks.
        self._lowest, self._order = from_first(self._plan, training.group)

    def _plan(self) -> tuple[dict[str, int], list[tuple[str, int]]]:
        target = self._due.stage.to
        assert isinstance(target, Budget)
        states = self._due.states()
        largest = target.ranks(states)
        return target.lowest_ranks(states), [step for step in target.order(states) if step[1] <= largest[step[0]]]

    def ranks(self, steps: int) -> dict[str, int]:
        """The rank of every layer after so many steps."""
        return self.now | self._lowest | dict(self._order[:steps])

    def compute(self, steps: int) -> Change:
        """The cut to so many steps, which is not yet made."""
        return self._due.change(self._training, lambda: self.ranks(steps))

    def passes(self, steps: int) -> bool:
        """Whether a cut to so many steps is allowed; a cut to all of them keeps all directions that may be kept."""
        all_are_kept = steps == len(self._order)
        return all_are_kept or self._test.allows(self._tried(steps).value)

    def fewest_steps(self) -> int:
        """The fewest steps that pass and cut at all, or the most steps that cut and do not pass; it has been tried."""
        self._test = RegressionTest(self._training, self._how)
        fewest = bisect_left(range(len(self._order)), True, key=self.passes)
        steps = fewest if self.ranks(fewest) != self.now else fewest - 1
        self._tried(steps)
        return steps

    def _tried(self, steps: int) -> Trial:
        if steps not in self.trials:
            change = self.compute(steps)
            with uninterrupted():
                change.apply()
            measured = self._test.measure()
            self._undo.restore()
            self.trials[steps] = Trial(measured.after, change.reports)
        return self.trials[steps]

    def measured(self, steps: int) -> Measured:
        """What a cut to so many steps costs; it has been tried."""
        return self._test.measured(self.trials[steps].value)

    def result(self, steps: int, parameters_before: int) -> str:
        """The text about a cut to so many steps for a run's history."""
        ranks = self.ranks(steps)
        measured = self.measured(steps)
        value = measured.after
        before = measured.before
        # A share of nothing cannot be said.
        worse = f"{(value - before) / abs(before):+.2%}" if before else f"{value - before:+.4g}"
        left = sum(ranks[name] * layer.params_per_rank for name, layer in self._due.layers.items())
        return (
            f"{sum(ranks.values()):,} of {sum(self.now.values()):,} directions, {left / parameters_before:.3f} of the "
            f"bytes at the start, {measured} "
            f"({worse}, {self._how.max_regression:.2%} allowed), measured against this run before this cut"
        )
