"""What a change costs: the metric of validations directly before and directly after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dynrank.driver.check import CHECK_MONITOR, metric_value
from dynrank.driver.event import Measured
from dynrank.driver.training import Training
from dynrank.driver.undo import validate
from dynrank.errors import ConfigurationError
from dynrank.schedules import Stage
from dynrank.triggers import Run

# How many changes may be measured however short the run is, and by how many batches in all.
_FEW = 2
_SMALL = 4


class Measurement:
    """The validations of one change that no check validates; made directly before the change.

    Args:
        training: the run before the change.
        metric: a metric that validations log.
        batches: how many batches a validation takes; None: all.
    """

    def __init__(self, training: Training, metric: str, batches: int | None) -> None:
        self._training = training
        self._metric = metric
        self._batches = batches
        self._metrics = validate(training, batches)
        self._before = self._value(self._metrics)

    def end(self) -> Measured:
        """Validate the changed weights; the two validations are logged if they took all data."""
        after = validate(self._training, self._batches)
        if self._batches is None:
            for metrics in (self._metrics, after):
                self._training.record(metrics)
        return Measured(self._metric, self._before, self._value(after), whole=self._batches is None)

    def _value(self, metrics: Mapping[str, float]) -> float:
        return metric_value(metrics, self._metric, {self._metric: CHECK_MONITOR})


def batches_to_measure(training: Training, stages: Sequence[Stage], run: Run) -> int | None:
    """How many batches each validation may take, so that all measurements cost under 2% of the run; None: all of them.

    A validation of a batch is counted as 4/3 of a training step: it is a third of the work, and batches of dynrank's
    tasks have four times as many texts. One or two changes get a few batches in any run. 0: there are too many changes.
    """
    changes = len(stages)
    there = training.validation_batches
    if there is None or run.total_steps is None:
        return None
    most = run.total_steps // (150 * changes)
    if changes <= _FEW:
        most = max(most, _SMALL // changes)
    return most if there > most else None


def check_measured(training: Training) -> None:
    """Refuse to measure in a run without validations."""
    if not training.validates:
        raise ConfigurationError(
            f"measure=True validates before and after each change; this run has no validation: {training.validate_by}, "
            "or set measure=False"
        )
