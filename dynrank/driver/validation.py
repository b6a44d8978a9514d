"""Validations for a change of ranks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

import numpy as np
import torch

from dynrank.driver.metrics import numbers_in
from dynrank.driver.training import Training


class _Validation:
    """A validation for a change, as long as it runs."""


# Weak, so that Ctrl-C at any line leaves none behind.
_running: WeakSet[_Validation] = WeakSet()


def validating_change() -> bool:
    """Whether the present validation is one for a change of ranks: before it, after it, or of a cut that is tried.

    A module, or a function of metrics, that keeps something of its validations can leave these out.

    >>> validating_change()
    False
    """
    return bool(_running)


def validate(training: Training) -> dict[str, float]:
    """The numbers among the metrics of a validation for a change.

    It draws from copies of the states of the random generators of Python, numpy and torch. So all validations for one
    change draw the same numbers, and the run goes on as without them.
    """
    running = _Validation()
    try:
        _running.add(running)
        with _random_states_kept(), torch.random.fork_rng(range(torch.cuda.device_count())):
            return numbers_in(training.validate())
    finally:
        _running.discard(running)
        for optimizer in training.optimizers:
            # Those of schedulefree step on other weights than they validate, and a change is one of the former.
            if callable(back := getattr(optimizer, "train", None)):
                back()


@contextmanager
def _random_states_kept() -> Iterator[None]:
    of_python = random.getstate()
    of_numpy = np.random.get_state()
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
