"""A change of ranks on trial: what it costs by a metric, and going back bit for bit."""

from __future__ import annotations

from functools import cached_property
from math import isfinite, isinf

from dynrank.change.change import Change
from dynrank.change.interrupts import uninterrupted
from dynrank.change.snapshot import Snapshot
from dynrank.driver.event import Measured
from dynrank.driver.metrics import metric_value
from dynrank.driver.training import Training
from dynrank.driver.validation import validate
from dynrank.schedules import How


class Trial:
    """A ``with`` block in which ranks may change; its end restores them, also after an error or Ctrl-C.

    Ranks, factors and optimizer state are restored bit for bit. An interrupt may come while the block ends,
    so enter it twice: ``with trial, trial:``.

    Args:
        training: the run before the change.
        how: names the metric, and the largest relative worsening, which may be infinite.
    """

    def __init__(self, training: Training, how: How) -> None:
        self._training = training
        self._how = how
        self._state: Snapshot | None = None

    def __enter__(self) -> None:
        self._state = self._state or Snapshot(self._training.adapters)

    def __exit__(self, *_: object) -> None:
        self.restore()
        self.keep()

    def keep(self) -> None:
        """Keep the present state: the end of the block then restores nothing."""
        self._state = None

    def restore(self) -> None:
        """Restore the state at the start of the block; another change may be tried then."""
        if self._state is not None:
            back = self._state.change_back()
            with uninterrupted():
                back.apply()

    def make(self, change: Change) -> Measured:
        """Make ``change``, and validate before the first one and after each."""
        before = self._before
        with uninterrupted():
            change.apply()
        return Measured(self._how.check_monitor, before, self._value())

    def allows(self, after: float) -> bool:
        """Whether the metric may have changed to ``after``; never if it is not finite, or was not before."""
        share = self._how.max_regression or 0.0
        # An infinite share of nothing would be NaN.
        most = share if isinf(share) else share * abs(self._before)
        worse = after - self._before if self._how.check_mode == "min" else self._before - after
        return isfinite(worse) and worse <= most

    @cached_property
    def _before(self) -> float:
        return self._value()

    def _value(self) -> float:
        return metric_value(validate(self._training), self._how.check_monitor, self._training.group)
