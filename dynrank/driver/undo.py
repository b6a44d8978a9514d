"""What a change of ranks needs if it may be undone: a copy to go back to, and the validations that decide."""

from __future__ import annotations

import random
from collections.abc import Mapping
from math import isfinite

import numpy as np
import torch

from dynrank.change.resize import Snapshot
from dynrank.driver.check import CHECK_MONITOR, metric_value
from dynrank.driver.event import Measured
from dynrank.driver.training import Training
from dynrank.schedules import How


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
            self._training.put(self._before.restore)

    def __enter__(self) -> None:
        self._before = self._before or Snapshot(self._training.model, self._training.optimizers)

    def __exit__(self, *_: object) -> None:
        self.restore()
        self.keep()


class RegressionTest:
    """Decides whether a change worsens the validated metric by more than the user allows.

    Args:
        training: the run before the change.
        how: names the metric, and the largest relative worsening.
        validated: metrics of these weights; None: they are validated here.

    Attributes:
        before: the metric before the change.
        most: largest worsening that is allowed.
        observed: metrics of the validations made for this test: before the change, and after it.
        measured: what the change cost, once it is made.
    """

    def __init__(self, training: Training, how: How, validated: Mapping[str, float] | None) -> None:
        self._training = training
        self._how = how
        before = validate(training) if validated is None else validated
        self.observed = [before] if validated is None else []
        self.before = self.value(before)
        self.most = (how.max_regression or 0.0) * abs(self.before)

    measured: Measured | None = None

    def failure(self) -> str | None:
        """Validate the changed weights; return why the change has to be undone, or None."""
        metrics = validate(self._training)
        self.observed.append(metrics)
        self.measured = Measured(self._how.check_monitor, self.before, self.value(metrics))
        return None if self.allows(self.measured.after) else f"undone: {self.measured}"

    def allows(self, after: float) -> bool:
        """Whether the metric may change from ``before`` to ``after``; never if one of the two is not finite."""
        worse = after - self.before if self._how.check_mode == "min" else self.before - after
        return isfinite(worse) and worse <= self.most

    def value(self, metrics: Mapping[str, float]) -> float:
        """The metric in ``metrics``, as the mean over all processes."""
        return metric_value(metrics, self._how.check_monitor, {self._how.check_monitor: CHECK_MONITOR})


def validate(training: Training, most: int | None = None) -> Mapping[str, float]:
    """Validate for a change, and restore the random generators and the model's buffers afterwards.

    So all validations for one change draw the same random numbers, and shuffled data come in the same order. About
    ``most`` batches are taken; None: all.
    """
    of_torch = torch.get_rng_state()
    of_python = random.getstate()
    of_numpy = np.random.get_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    buffers = [(buffer, buffer.clone()) for buffer in training.model.buffers() if buffer.device.type != "meta"]
    try:
        return training.validate() if most is None else training.validate_share(most)
    finally:
        torch.set_rng_state(of_torch)
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)
        for buffer, before in buffers:
            if not torch.equal(buffer, before):
                buffer.copy_(before)
