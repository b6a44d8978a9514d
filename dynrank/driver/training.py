"""What a rank driver must know of a training run, and what it asks of it: the one thing that a new trainer provides."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from dynrank.distributed.ddp import give_back_reducers, take_reducers
from dynrank.distributed.unwrapping import unwrapped_model, unwrapped_optimizer
from dynrank.driver.event import RankEvent
from dynrank.private import scaler_of_fabric

# Of each batch the mean of a metric, its weight in the mean of all batches, and a number that other data do not have.
Batches = Sequence[tuple[float, float, float]]


@dataclass(eq=False)
class Training:
    """A training run, for a plain loop as it stands; derive from it what the schedule needs beyond, or a trainer has.

    Models and optimizers may be wrapped by DDP, Lightning Fabric or accelerate. DDP modules follow every change.

    Args:
        model: holds the LoRA layers; their names are relative to it, without wrappers.
        optimizers: all that hold the layers' parameters.
        step: optimizer steps made so far; the loop counts them.
        averages: moving averages of the model's weights, which follow its ranks.
    """

    model: nn.Module
    optimizers: Sequence[Optimizer]
    step: int = 0
    averages: Sequence[nn.Module] = ()

    # What a user may do to make a run validate.
    validate_by: ClassVar[str] = "define validate() in a class derived from Training"

    def __post_init__(self) -> None:
        self._scalers = [scaler for scaler in map(_scaler, self.optimizers) if scaler is not None]
        self.model = unwrapped_model(self.model)
        self.optimizers = [unwrapped_optimizer(optimizer) for optimizer in self.optimizers]
        self._torn: list[tuple[Any, dict[str, Any]]] = []

    @property
    def validates(self) -> bool:
        """Whether :meth:`validate` can be called."""
        return type(self).validate is not Training.validate

    def validate(self) -> Mapping[str, float]:
        """Validate the weights as they are and return the metrics; called around changes that are checked."""
        raise NotImplementedError(self.validate_by)

    def validate_batches(self, monitor: str) -> tuple[Mapping[str, float], Batches]:
        """Validate around a change, the same data every time.

        Return the metrics, and the batches' parts in ``monitor``, which tell the noise; none where they are not known.
        """
        return self.validate(), []

    def record(self, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a validation that was made for a change which has stayed."""

    def loss_scale(self) -> float:
        """Return what the loss of the next step is multiplied by before backward, as by torch.amp.GradScaler."""
        return float(self._scalers[0].get_scale()) if self._scalers else 1.0

    def logged(self) -> Mapping[str, float]:
        """Return the last value of every metric that a trigger may watch beside those of the validation."""
        return {}

    def before_resize(self) -> None:
        """Let go of what knows the factors' shapes; called before every change and before one is undone."""
        self._torn = self._torn or take_reducers(self.model)

    def after_resize(self) -> None:
        """Take the factors' new shapes; called after every change and after one is undone."""
        give_back_reducers(self._torn)
        self._torn = []

    def tell(self, event: RankEvent) -> None:
        """Pass ``event`` to those who listen."""

    def warn(self, message: str) -> None:
        """Tell the user, once for all processes."""
        warnings.warn(message, stacklevel=2)


def _scaler(optimizer: Any) -> Any:
    """The GradScaler behind an optimizer that accelerate, or Fabric, has wrapped; None where there is none."""
    return getattr(optimizer, "scaler", None) or scaler_of_fabric(optimizer)
