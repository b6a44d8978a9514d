"""What a change of ranks needs if it may be undone: a copy to go back to, and the validations that decide."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

from dynrank.change.interrupts import uninterrupted
from dynrank.change.snapshot import Snapshot
from dynrank.driver.checks import CHECK_MONITOR, metric_value
from dynrank.driver.event import Measured
from dynrank.driver.in_processes import apply_change
from dynrank.driver.training import Training
from dynrank.driver.validation import validate
from dynrank.schedules import How
from dynrank.triggers import Run

# How many changes may be measured however short the run is, and by how many batches in all.
_FEW = 2
_SMALL = 4


class Undo:
    """A ``with`` block in which ranks may change; its end restores them, also after an error or Ctrl-C.

    Ranks, factors and optimizer state are restored bit for bit. An interrupt may come while the block ends,
    so enter it twice: ``with undo, undo:``.
    """

    def __init__(self, training: Training) -> None:
        self._training = training
        self._before: Snapshot | None = None

    def keep(self) -> None:
        """Keep the present state: the end of the block then restores nothing."""
        self._before = None

    def restore(self) -> None:
        """Restore the state at the start of the block; another change may be tried then."""
        if self._before is not None:
            back = self._before.change_back()
            with uninterrupted():
                apply_change(self._training, back)

    def __enter__(self) -> None:
        self._before = self._before or Snapshot(self._training.model, self._training.optimizers)

    def __exit__(self, *_: object) -> None:
        self.restore()
        self.keep()


class RegressionTest:
    """Measures what a change costs, and decides whether that is more than the user allows.

    Args:
        training: the run before the change.
        how: names the metric, and the largest relative worsening.
        batches: about how many batches a validation takes; None: all.

    Attributes:
        before: the metric before the change.
        most: largest worsening that is allowed.
        observed: metrics of the validations of all data that were made for this test: before the change, and after it.
    """

    def __init__(self, training: Training, how: How, batches: int | None = None) -> None:
        self._training = training
        self._how = how
        self._batches = batches
        self.observed: list[Mapping[str, float]] = []
        metrics = self._validate()
        self._name = training.own_name(how.check_monitor, metrics)
        self.before = self.value(metrics)
        self.most = (how.max_regression or 0.0) * abs(self.before)

    def measure(self) -> Measured:
        """Validate the changed weights."""
        return self.measured(self.value(self._validate()))

    def measured(self, after: float) -> Measured:
        """What a change costs after which the metric is ``after``."""
        return Measured(self._name, self.before, after, all_data=self._batches is None)

    def record(self) -> None:
        """Log the validations of a change that was kept."""
        for metrics in self.observed:
            self._training.record(metrics)

    def _validate(self) -> Mapping[str, float]:
        metrics = validate(self._training, self._batches)
        if self._batches is None:
            self.observed.append(metrics)
        return metrics

    def allows(self, after: float) -> bool:
        """Whether the metric may change from ``before`` to ``after``; never if one of the two is not finite."""
        worse = after - self.before if self._how.check_mode == "min" else self.before - after
        return isfinite(worse) and worse <= self.most

    def value(self, metrics: Mapping[str, float]) -> float:
        """The metric in ``metrics``, as the mean over all processes."""
        arguments = {self._how.check_monitor: CHECK_MONITOR}
        return metric_value(metrics, self._how.check_monitor, arguments, self._training.group)


def batches_to_measure(training: Training, changes: int, run: Run) -> int | None:
    """How many batches each validation may take, so that all measurements cost under 2% of the run; None: all of them.

    A validation of a batch is counted as 4/3 of a training step: it is a third of the work, and batches of dynrank's
    tasks have four times as many texts. One or two changes get a few batches in any run. 0: there are too many changes.
    """
    there = training.validation_batches
    if there is None or run.total_steps is None:
        return None
    most = run.total_steps // (150 * changes)
    if changes <= _FEW:
        most = max(most, _SMALL // changes)
    return most if there > most else None
