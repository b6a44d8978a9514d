"""What a run has logged: the last value of each metric, the ranks that it is of, and whether a trigger has read it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor


@dataclass
class _Value:
    """A value, a number or a tensor of one; see :class:`LoggedMetrics`."""

    value: Any
    changes: int
    is_read: bool = False


class LoggedMetrics:
    """The last value of each metric of a run.

    A value is of the present ranks if all steps that it is of came after the last change. A mean over an epoch in which
    ranks have changed is not.

    Attributes:
        changes: how many changes of rank were made.
        last_cut: how many of them were made with the last one that has lowered ranks; 0: none has.

    >>> logged = LoggedMetrics()
    >>> logged.log({"loss": 1.0})
    >>> logged.changed(lowers=True)
    >>> logged.is_of_before("loss"), logged.of_before_cut()
    (True, {'loss'})
    >>> logged.log({"loss": 2.0})
    >>> logged.is_of_before("loss"), logged.is_new("loss"), logged.values()
    (False, True, {'loss': 2.0})
    """

    def __init__(self) -> None:
        self.changes = 0
        self.last_cut = 0
        self._last: dict[str, _Value] = {}

    def log(self, metrics: Mapping[str, Any], changes: int | None = None) -> None:
        """Take what was logged now.

        Args:
            metrics: {name: a number, or a tensor of one number, which is read later}.
            changes: how many changes were made before the first step that the values are of; None: all.
        """
        made = self.changes if changes is None else changes
        self._last.update({name: _Value(value, made) for name, value in metrics.items()})

    def read(self, names: Iterable[str]) -> None:
        """Take note that a trigger has read the metrics ``names``, as far as they were logged."""
        for name in self._last.keys() & names:
            self._last[name].is_read = True

    def changed(self, *, lowers: bool) -> None:
        """Take note of a change of ranks: all values are of before it."""
        self.changes += 1
        if lowers:
            self.last_cut = self.changes

    def values(self) -> dict[str, float]:
        """{name: the last value}."""
        return {name: self.value(name) for name in self._last}

    def value(self, name: str) -> float:
        """The last value of ``name``, which was logged."""
        return float(self._last[name].value)

    def is_new(self, name: str) -> bool:
        """Whether ``name`` was logged, is of the present ranks, and no trigger has read it."""
        return name in self._last and not self._last[name].is_read and not self.is_of_before(name)

    def is_of_before(self, name: str) -> bool:
        """Whether what was last logged as ``name`` is of steps before the last change, too."""
        return name in self._last and self._last[name].changes < self.changes

    def of_before_cut(self) -> set[str]:
        """The metrics whose last value is of steps before the last change that has lowered ranks, too."""
        return {name for name, last in self._last.items() if last.changes < self.last_cut}

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and numbers."""
        last = {name: [float(last.value), last.changes, last.is_read] for name, last in self._last.items()}
        return {"changes": self.changes, "last_cut": self.last_cut, "last": last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        self.changes = state["changes"]
        self.last_cut = state["last_cut"]
        self._last = {name: _Value(*row) for name, row in state["last"].items()}


def numbers_in(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among ``metrics``; a program may also have lists, tables or texts there.

    >>> numbers_in({"bleu": 31.5, "precisions": [60.0, 40.0], "length": np.int64(7)})
    {'bleu': 31.5, 'length': 7.0}
    """
    return {name: number for name, value in metrics.items() if (number := _number(value)) is not None}


def _number(value: Any) -> float | None:
    """``value`` if it is a number, or an array or tensor of one number; None if it is not."""
    if isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) == 1:
        value = value.item()
    # numpy's numbers are of Real, too.
    return float(value) if isinstance(value, Real) else None
