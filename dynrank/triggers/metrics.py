"""Triggers on metrics: one has stopped improving, or validation is worse than training."""

from dataclasses import field
from math import isfinite
from typing import Literal

from dynrank.errors import Count, Name, NotNegative, Positive, checked
from dynrank.triggers.base import Trigger

Mode = Literal["min", "max"]


@checked(frozen=False)
class Plateau(Trigger):
    """True once a metric has not improved for ``patience`` observations in a row.

    A value is an improvement if it is better than the best one since the last change of rank by more than
    ``min_delta``, relative to the best (as in torch's ReduceLROnPlateau with ``threshold_mode="rel"``, but for either
    sign of the metric). A value that is not finite says nothing, and is left out.

    Args:
        monitor: name of a metric of validations, or ``train/loss``.
        mode: "min" if smaller is better, else "max".
        patience: observations in a row without improvement.
        min_delta: smallest relative improvement that counts.

    >>> trigger = Plateau(patience=1)
    >>> [trigger.observe(step, loss) for step, loss in [(10, 1.0), (20, 0.8), (30, 0.8)]]
    [False, False, True]
    """

    monitor: Name = "val/loss"
    mode: Mode = "min"
    patience: Count = 2
    min_delta: NotNegative = 0.01
    _best: float | None = field(default=None, init=False, repr=False)
    _stale: int = field(default=0, init=False, repr=False)

    @property
    def monitors(self) -> tuple[str, ...]:
        return (self.monitor,)

    @property
    def reason(self) -> str:
        return f"plateau of {self.monitor}"

    def fires(self, value: float) -> bool:
        if not isfinite(value):
            return False
        sign = 1 if self.mode == "min" else -1
        if self._best is None or sign * (self._best - value) > self.min_delta * abs(self._best):
            self._best = value
            self._stale = 0
        else:
            self._stale += 1
        return self._stale >= self.patience


@checked(frozen=False)
class Gap(Trigger):
    """True once validation is worse than training by more than ``threshold`` in the mean of ``window`` observations.

    The gap of two losses is relative to the training loss: ``(validation - training) / |training|``.

    Args:
        train: ``train/loss``, the mean loss of the steps since the last validation; or a metric of training data that
            validations log.
        val: name of the validation metric.
        mode: "min" if smaller is better, else "max".
        threshold: smallest gap that fires.
        window: number of observations in the mean.

    >>> trigger = Gap(threshold=0.2, window=2)
    >>> [trigger.observe(step, train, 1.0) for step, train in ((10, 0.9), (20, 0.8), (30, 0.7))]
    [False, False, True]
    """

    train: Name = "train/loss"
    val: Name = "val/loss"
    mode: Mode = "min"
    threshold: Positive = 0.2
    window: Count = 3
    _gaps: list[float] = field(default_factory=list, init=False, repr=False)

    @property
    def monitors(self) -> tuple[str, ...]:
        return (self.train, self.val)

    @property
    def reason(self) -> str:
        return f"{self.val} apart from {self.train}"

    def fires(self, train: float, val: float) -> bool:
        worse = val - train if self.mode == "min" else train - val
        if isfinite(worse) and train != 0:
            self._gaps = [*self._gaps, worse / abs(train)][-self.window :]
        return len(self._gaps) == self.window and sum(self._gaps) / self.window > self.threshold
