"""Validations for a change of ranks."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from weakref import WeakSet

import numpy as np
import torch

from dynrank.driver.metrics import judging_metrics, metric_value, numbers_in
from dynrank.driver.training import Training
from dynrank.schedules import Stage

# The runs that validate for a change; weak, so that Ctrl-C at any line leaves nothing behind when its run is gone.
_validating: WeakSet[Training] = WeakSet()


def validating_change() -> bool:
    """Whether dynrank has called the present validation: for a change of ranks, or for what a trigger has missed.

    A module, or a function of metrics, that keeps something of its validations can leave these out.

    >>> validating_change()
    False
    """
    return bool(_validating)


def validate(training: Training) -> dict[str, float]:
    """The numbers among the metrics of a validation for a change.

    It draws from copies of the states of the random generators of Python, numpy and torch. So all validations for one
    change draw the same numbers, and the run goes on as without them.
    """
    of_python = random.getstate()
    of_numpy = np.random.get_state()
    try:
        _validating.add(training)
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            return numbers_in(training.validate())
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        _validating.discard(training)
        for optimizer in training.optimizers:
            # Those of schedulefree step on other weights than they validate, and a change is one of the former.
            if callable(back := getattr(optimizer, "train", None)):
                back()


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
