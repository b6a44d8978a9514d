"""Changing ranks at a time that is known before the run starts."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from dynrank.errors import ConfigurationError


@dataclass(frozen=True)
class Run:
    """How long a run is: ``total_steps`` optimizer steps (None: nobody knows), ``steps_per_epoch`` likewise."""

    total_steps: int | None
    steps_per_epoch: int | None = None


@dataclass(frozen=True)
class At:
    """A time in a run; exactly one of the three.

    Args:
        step: optimizer steps made before the change.
        epoch: epochs of training data made before the change.
        fraction: share of the run's optimizer steps, in [0, 1]; 1 is after the last one.

    Raises:
        ConfigurationError: if a value is out of range, or not exactly one is given.

    >>> At(fraction=0.5).in_steps(Run(total_steps=101))
    51
    """

    step: int | None = None
    epoch: int | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ConfigurationError(
                f"a time is one of step, epoch and fraction, got {given or 'none'}; set schedule.trigger"
            )
        ((name, value),) = given.items()
        whole = name == "fraction" or isinstance(value, int)
        if isinstance(value, bool) or not isinstance(value, int | float) or not whole or not value >= 0:
            raise ConfigurationError(
                f"{name} must be a number of at least 0, got {value!r}; set schedule.trigger.{name}"
            )
        if name == "fraction" and value > 1:
            raise ConfigurationError(f"fraction must be in [0, 1], got {value!r}; set schedule.trigger.fraction")

    @property
    def reason(self) -> str:
        return next(f"{name} {value:g}" for name, value in vars(self).items() if value is not None)

    def in_steps(self, run: Run) -> int:
        """The optimizer step before which the change is made.

        Raises:
            ConfigurationError: if the run's length is needed and not known.
        """
        if self.step is not None:
            return self.step
        if self.epoch is not None:
            if run.steps_per_epoch is None:
                raise ConfigurationError("an epoch needs data of known length; set schedule.trigger.step instead")
            return self.epoch * run.steps_per_epoch
        if run.total_steps is None:
            raise ConfigurationError("a share of a run needs a run of known length; set trainer.max_steps")
        return ceil((self.fraction or 0.0) * run.total_steps - 1e-9)  # 0.3 * 10 is 3.0000000000000004
