"""Times that are known before a run starts."""

from dataclasses import dataclass
from math import ceil
from typing import Annotated

from pydantic import Field

from dynrank.errors import ConfigurationError, Steps, checked


@dataclass(frozen=True)
class Run:
    """The optimizer steps of a run, and of an epoch; None if unknown.

    >>> At(epoch=2).in_steps(Run(total_steps=100, steps_per_epoch=25))
    50
    """

    total_steps: int | None
    steps_per_epoch: int | None = None


@checked
class At:
    """A time in a run; exactly one of the three is given.

    Args:
        step: number of optimizer steps before the change.
        epoch: number of epochs of training data before the change.
        fraction: share of the run's optimizer steps before the change, in [0, 1]; 1 is after the last one.

    Raises:
        ConfigurationError: if a value is out of range, or not exactly one is given.

    >>> At(fraction=0.5).in_steps(Run(total_steps=101))
    51
    """

    step: Steps | None = None
    epoch: Steps | None = None
    fraction: Annotated[float, Field(ge=0, le=1)] | None = None

    def __post_init__(self) -> None:
        if len(self._given()) != 1:
            raise ConfigurationError(
                f"a time must be one of step, epoch and fraction, got {self._given() or 'none'}",
                *self._given() or ("step", "epoch", "fraction"),
            )

    def _given(self) -> dict[str, float]:
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def reason(self) -> str:
        """The text that a run's history shows for a change at this time."""
        ((name, value),) = self._given().items()
        return f"{name} {value:g}"

    def in_steps(self, run: Run) -> int:
        """The number of optimizer steps before the change."""
        if self.step is not None:
            return self.step
        if self.epoch is not None:
            if run.steps_per_epoch is None:
                raise ConfigurationError(
                    "epoch needs data of known length, and steps of equally many batches; give step instead", "epoch"
                )
            return self.epoch * run.steps_per_epoch
        if run.total_steps is None:
            raise ConfigurationError("a share of a run needs a run of known length; set max_steps", "max_steps")
        # The small number cancels rounding errors: 0.3 * 10 is 3.0000000000000004 in floats.
        return ceil((self.fraction or 0.0) * run.total_steps - 1e-9)
