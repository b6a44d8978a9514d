"""When to act on logged metrics: they have stopped improving, or training and validation have come apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite

from dynrank.errors import ConfigurationError
from dynrank.triggers.base import Trigger, check_count, check_least, check_name


def _check_mode(mode: str) -> None:
    if mode not in ("min", "max"):
        raise ConfigurationError(f"mode must be min or max, got {mode!r}; set schedule.trigger.mode")


@dataclass
class _OfOneMetric(Trigger):
    monitor: str = "val/loss"
    mode: str = "min"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(self, "monitor")
        _check_mode(self.mode)

    @property
    def monitors(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.monitor,)


@dataclass
class Plateau(_OfOneMetric):
    """True once a metric has not improved for ``patience`` observations in a row, after a warm-up.

    An observation improves when it beats the best one since the last change of rank by more than ``min_delta``,
    relative to the best (as torch's ReduceLROnPlateau with ``threshold_mode="rel"``, but for either sign of the
    metric). A value that is not finite never improves on anything.

    Args:
        monitor: name of a logged metric.
        mode: "min" if smaller is better, else "max".
        patience: observations without improvement before acting, >= 1.
        min_delta: relative improvement that counts, >= 0.

    Raises:
        ConfigurationError: if a value is outside its range.
    """

    patience: int = 3
    min_delta: float = 0.01
    _best: float | None = field(default=None, init=False, repr=False)
    _stale: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, patience=1)
        check_least(self, min_delta=0)

    @property
    def reason(self) -> str:
        return f"plateau of {self.monitor}"

    def _fires(self, value: float) -> bool:
        if self._improves(value):
            self._best, self._stale = value, 0
        else:
            self._stale += 1
        return self._stale >= self.patience

    def _forget(self) -> None:
        self._best, self._stale = None, 0

    def _improves(self, value: float) -> bool:
        if not isfinite(value):
            return False
        if self._best is None:
            return True
        gain = self._best - value if self.mode == "min" else value - self._best
        return gain > self.min_delta * abs(self._best)


@dataclass
class Slope(_OfOneMetric):
    """True once a straight line through the last ``window`` observations improves by no more than ``min_delta`` in all.

    The line is the least-squares fit, so single noisy values count less than in :class:`Plateau`; its improvement over
    the window is relative to the mean.

    Args:
        monitor: name of a logged metric.
        mode: "min" if smaller is better, else "max".
        window: observations, >= 3; values that are not finite are left out.
        min_delta: relative improvement over the window that still counts as progress, >= 0.

    Raises:
        ConfigurationError: if a value is outside its range.
    """

    window: int = 5
    min_delta: float = 0.01
    _values: list[float] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, window=3)
        check_least(self, min_delta=0)

    @property
    def reason(self) -> str:
        return f"{self.monitor} level over {self.window} values"

    def _fires(self, value: float) -> bool:
        if isfinite(value):
            self._values = [*self._values, value][-self.window :]
        if len(self._values) < self.window:
            return False
        n, mean = self.window, sum(self._values) / self.window
        positions = [i - (n - 1) / 2 for i in range(n)]
        slope = sum(i * v for i, v in zip(positions, self._values, strict=True)) / sum(i * i for i in positions)
        improvement = (n - 1) * (-slope if self.mode == "min" else slope)
        return improvement <= self.min_delta * abs(mean)

    def _forget(self) -> None:
        self._values = []


@dataclass
class Gap(Trigger):
    """True once validation is worse than training by more than ``threshold``, as a mean of ``window`` observations.

    The gap of two losses is relative to the training loss: ``(validation - training) / |training|``.

    Args:
        train: name of a logged training metric; its last logged value counts, so log a mean if it is noisy.
        val: name of the validation metric.
        mode: "min" if smaller is better, else "max".
        threshold: gap to act on, > 0.
        window: observations averaged, >= 1.

    Raises:
        ConfigurationError: if a value is outside its range.
    """

    train: str = "train/loss"
    val: str = "val/loss"
    mode: str = "min"
    threshold: float = 0.2
    window: int = 3
    _gaps: list[float] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(self, "train", "val")
        _check_mode(self.mode)
        check_count(self, window=1)
        check_least(self, threshold=0)
        if self.threshold == 0:
            raise ConfigurationError("threshold must be above 0, got 0; set schedule.trigger.threshold")

    @property
    def monitors(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.train, self.val)

    @property
    def reason(self) -> str:
        return f"{self.val} apart from {self.train}"

    def _fires(self, train: float, val: float) -> bool:
        worse = val - train if self.mode == "min" else train - val
        if isfinite(worse) and train != 0:
            self._gaps = [*self._gaps, worse / abs(train)][-self.window :]
        return len(self._gaps) == self.window and sum(self._gaps) / self.window > self.threshold

    def _forget(self) -> None:
        self._gaps = []
