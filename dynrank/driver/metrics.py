"""The metrics that a schedule reads, by the names that the user gives: of validations, and the loss of training."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor
from torch.distributed import ProcessGroup

from dynrank.distributed.processes import mean_over_processes
from dynrank.errors import ConfigurationError
from dynrank.schedules import Stage
from dynrank.triggers import Trigger

# The only metric of training that triggers read.
TRAIN_LOSS = "train/loss"


def numbers_in(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among ``metrics``; a program may also have lists, tables or texts there.

    >>> numbers_in({"bleu": 31.5, "precisions": [60.0, 40.0], "length": np.int64(7)})
    {'bleu': 31.5, 'length': 7.0}
    """
    found = {}
    for name, value in metrics.items():
        if isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) == 1:
            value = value.item()
        # numpy's numbers are of Real, too.
        if isinstance(value, Real):
            found[name] = float(value)
    return found


class TrainingLoss:
    """The mean loss of training since it was last looked at, or since ranks have changed.

    >>> import torch
    >>> loss = TrainingLoss()
    >>> loss.add(1.0)
    >>> loss.add(Tensor([4.0]), steps=2)
    >>> loss.look(), loss.look()
    (3.0, nan)
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew, because ranks have changed."""
        # A number or a tensor: reading it would wait for a GPU.
        self._sum: Any = 0.0
        self._steps = 0

    def add(self, mean: Any, steps: int = 1) -> None:
        """Add the ``mean`` loss of some steps; None: they had none."""
        if mean is not None:
            # A sum in bfloat16 would stay where it is after 256 steps.
            self._sum = self._sum + (mean.float() if isinstance(mean, Tensor) else mean) * steps
            self._steps += steps

    def look(self) -> float:
        """The mean of this process; NaN, which says nothing to a trigger, if there was no step."""
        mean = float(self._sum) / self._steps if self._steps else math.nan
        self.forget()
        return mean

    def state_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return {"sum": float(self._sum), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Load what :meth:`state_dict` returned."""
        self._sum = state["sum"]
        self._steps = int(state["steps"])


def observed_metrics(stages: Sequence[Stage]) -> dict[str, str]:
    """{metric that a trigger reads: the name of the trigger, for errors}."""
    triggers = [stage.when for stage in stages if isinstance(stage.when, Trigger)]
    return {name: type(trigger).__name__ for trigger in triggers for name in trigger.monitors}


def judging_metrics(stages: Sequence[Stage]) -> set[str]:
    """The metrics by which changes are judged; a validation for a change must have them."""
    return {stage.how.check_monitor for stage in stages if stage.how.max_regression is not None}


def check_observed(stages: Sequence[Stage], logged: Collection[str]) -> None:
    """Refuse a trigger whose metric is not among those that validations have, and the loss of training, ``logged``."""
    for name, trigger in observed_metrics(stages).items():
        if name not in logged:
            raise _not_there(name, trigger, "monitor", logged, _CURES)


def metric_value(metrics: Mapping[str, float], name: str, group: ProcessGroup | None) -> float:
    """The metric that judges a change, as the mean over all processes of ``group``."""
    if name not in metrics:
        raise _not_there(name, "check_monitor of How", "check_monitor", metrics, _JUDGED)
    return mean_over_processes(float(metrics[name]), group)


_JUDGED = (
    ". A validation for a change has these, and calls no callback: log it in the module's own validation, or return it "
    "from evaluate= (in a loop from validate())"
)
_CURES = (
    f". A trigger reads the metrics of validations, and {TRAIN_LOSS}, the mean loss of the steps since the last one: "
    f"log it in each validation, or observe {TRAIN_LOSS}"
)


def _not_there(name: str, reader: str, argument: str, logged: Collection[str], advice: str) -> ConfigurationError:
    found = ", ".join(map(repr, sorted(logged)))
    return ConfigurationError(
        f"{reader} must name a metric that is logged, got {name!r}; logged: {found}{advice}", argument
    )
