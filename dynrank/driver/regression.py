"""What a change of ranks costs: a metric before and after it, and whether that is more than the user allows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import isfinite, isinf

from dynrank.driver.event import Measured
from dynrank.driver.metrics import judging_metrics, metric_value
from dynrank.driver.training import Training
from dynrank.driver.validation import validate
from dynrank.schedules import How, Stage


class RegressionTest:
    """Measures what a change costs, and decides whether that is more than the user allows.

    Args:
        training: the run before the change.
        how: names the metric, and the largest relative worsening, which may be infinite.

    Attributes:
        before: the metric before the change.
        most: largest worsening that is allowed.
    """

    def __init__(self, training: Training, how: How) -> None:
        self._training = training
        self._how = how
        self.before = self._value(validate(training))
        share = how.max_regression or 0.0
        # An infinite share of nothing would be NaN.
        self.most = share if isinf(share) else share * abs(self.before)

    def measure(self) -> Measured:
        """Validate the changed weights."""
        return Measured(self._how.check_monitor, self.before, self._value(validate(self._training)))

    def allows(self, after: float) -> bool:
        """Whether the metric may change from ``before`` to ``after``; never if one of the two is not finite."""
        worse = after - self.before if self._how.check_mode == "min" else self.before - after
        return isfinite(worse) and worse <= self.most

    def _value(self, metrics: Mapping[str, float]) -> float:
        """The metric in ``metrics``, as the mean over all processes."""
        return metric_value(metrics, self._how.check_monitor, self._training.group)


def check_judges(training: Training, stages: Sequence[Stage], metrics: Collection[str]) -> bool:
    """Refuse stages whose changes are judged by a metric that validations for a change lack; whether that is known now.

    ``metrics`` are those of the run's own validation. One that lacks the metric says nothing of a validation for a
    change, so one is made.
    """
    absent = judging_metrics(stages) - {*metrics}
    found = validate(training) if absent else {}
    for name in absent:
        metric_value(found, name, training.group)
    return bool(metrics)
