"""The interface between a rank driver and a training run; support for a new trainer is a class derived from it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias

from torch import nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from dynrank.change.change import Adapters
from dynrank.distributed.sharding import process_group
from dynrank.distributed.wrappers import ddp_modules, unwrapped_model, unwrapped_optimizer
from dynrank.driver.event import RankEvent
from dynrank.importance.importance import Importance, ImportanceSums
from dynrank.importance.step_gradients import StepsOfAll
from dynrank.layers.finding import adapter_parameters
from dynrank.layers.ranked_layer import RankedLayer

# A function of the user's that evaluates the present model, and returns metrics.
Evaluate: TypeAlias = Callable[[], Mapping[str, Any]]


class ImportanceSteps(Protocol):
    """What measures the importance of layers in the steps of a run."""

    def end_step(self) -> None: ...

    def remove(self) -> None: ...


@dataclass(eq=False)
class Training:
    """A training run. A plain loop can use this class; override a method that the schedule or a trainer needs.

    Models and optimizers are passed as DDP, Lightning Fabric or accelerate has wrapped them. DDP modules follow every
    change. The processes of DDP's ``process_group``, or of FSDP2's mesh, change ranks together; others may train
    another model.

    Args:
        model: contains the LoRA layers; their names are relative to it, without wrappers. A model that DDP has wrapped
            does not know of it, so pass what DDP has returned.
        optimizers: all optimizers of the layers' parameters.
        step: optimizer steps made so far; the loop counts them.
        schedulers: schedulers that wait for a better metric (ReduceLROnPlateau): after a cut they wait anew.

    A class that validates, for schedules whose changes are judged by a metric:

    >>> import torch, dynrank
    >>> class Loop(dynrank.Training):
    ...     def validate(self):
    ...         with torch.no_grad():
    ...             return {"val/loss": float(self.model(torch.ones(1, 8)).square().mean())}
    >>> model = dynrank.add_lora(torch.nn.Sequential(torch.nn.Linear(8, 8)), rank=4)
    >>> loop = Loop(model, [torch.optim.AdamW(dynrank.adapter_parameters(model))])
    >>> loop.validates, sorted(loop.validate())
    (True, ['val/loss'])
    """

    model: nn.Module
    optimizers: Sequence[Optimizer]
    step: int = 0
    schedulers: Sequence[Any] = ()

    # Advice in error messages: how the user makes a run validate.
    validate_by: ClassVar[str] = "define validate() in a class derived from Training"

    def __post_init__(self) -> None:
        self.ddp = ddp_modules(self.model)
        self.model = unwrapped_model(self.model)
        self.optimizers = [unwrapped_optimizer(optimizer) for optimizer in self.optimizers]

    @property
    def group(self) -> ProcessGroup | None:
        """The processes that train the model and change its ranks together; None: all."""
        return process_group(self.model, self.ddp)

    @property
    def adapters(self) -> Adapters:
        """What changes together in this run."""
        return Adapters(self.model, self.optimizers, ddp=self.ddp, group=self.group, write_back=self.write_back)

    @property
    def validates(self) -> bool:
        """Whether :meth:`validate` can be called."""
        return type(self).validate is not Training.validate

    def validate(self) -> Mapping[str, Any]:
        """Validate the present weights and return the metrics, with the same data every time.

        Called before and after changes that are judged.
        """
        raise NotImplementedError(self.validate_by)

    def tell(self, event: RankEvent) -> None:
        """Pass ``event`` to whatever reports changes, such as callbacks."""

    def warn(self, message: str) -> None:
        """Warn the user, once for all processes."""
        warnings.warn(message, stacklevel=2)

    # For a trainer that keeps factors in tensors of its own

    def gathered(self) -> AbstractContextManager[None]:
        """A block in which the layers of ``model``, and the states of ``optimizers``, have their present values."""
        return nullcontext()

    def write_back(self) -> None:
        """Pass factors and states, which a change has just replaced, on to where they are trained."""

    def importance_of(self, layers: Mapping[str, RankedLayer]) -> ImportanceSums:
        """What sums the importance of the layers of ``model``."""
        return Importance(layers)

    def steps_of(self, importance: ImportanceSums) -> ImportanceSteps:
        """What passes the steps of the optimizers to ``importance``, which :meth:`importance_of` has made."""
        assert isinstance(importance, Importance)
        return StepsOfAll(importance, self.optimizers, adapter_parameters(self.model))
