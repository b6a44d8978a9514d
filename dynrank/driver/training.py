"""The interface between a rank driver and a training run; support for a new trainer is a class derived from it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from dynrank.distributed.sharding import process_group
from dynrank.distributed.wrappers import ddp_modules, unwrapped_model, unwrapped_optimizer
from dynrank.driver.event import RankEvent
from dynrank.driver.importance import Importance, ImportanceSums
from dynrank.driver.last_step import LastSteps
from dynrank.layers.base import RankedLayer
from dynrank.layers.finding import adapter_parameters


class MeasuredSteps(Protocol):
    """What measures the importance of layers in the steps of a run."""

    @property
    def missed(self) -> int: ...

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
        schedulers: all learning-rate schedulers, if the loop sets rates by nothing else. When a change raises the
            adapters' rate (``lr_factor``), the rates of torch's schedulers, which logs show, are then multiplied.
            Where none is named, the rate is raised inside each step of the optimizer, and the rates that the loop sets,
            and logs, are those without the factor. ReduceLROnPlateau starts anew after a cut. The list may be replaced
            during the run. A scheduler that is made after a change begins at the rate that it finds, with the factor;
            one with a rate of its own (SWALR, OneCycleLR) keeps that rate, so name it from the start.

    A class that validates, for schedules that read a metric:

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
    schedulers: Sequence[Any] | None = None

    # Whether a trainer knows all its schedulers. Any other rate is then one that the program has set by itself.
    knows_schedulers: ClassVar[bool] = False
    # Whether a validation for a change has the metrics of the run's own validations, and no others.
    validates_alike: ClassVar[bool] = False
    # Advice in error messages: how the user makes a run validate, and how it logs a metric that a trigger reads.
    validate_by: ClassVar[str] = "define validate() in a class derived from Training"
    log_by: ClassVar[str] = "; a loop logs a metric of training by driver.logged.log, before driver.validated"

    def __post_init__(self) -> None:
        self.ddp = ddp_modules(self.model)
        self.model = unwrapped_model(self.model)
        self.optimizers = [unwrapped_optimizer(optimizer) for optimizer in self.optimizers]

    @property
    def group(self) -> ProcessGroup | None:
        """The processes that train the model and change its ranks together; None: all."""
        return process_group(self.model, self.ddp)

    def present_schedulers(self) -> Sequence[Any] | None:
        """The schedulers of the next step; a trainer's may be replaced during the run."""
        return self.schedulers

    @property
    def limits_are_rates(self) -> bool | None:
        """Whether the user has given the limits of transformers' schedulers as rates, ``min_lr``, which stay.

        If False, they are shares of the rate (``min_lr_rate``); None: unknown, so they count as shares, with a warning.
        """
        return None

    @property
    def validates(self) -> bool:
        """Whether :meth:`validate` can be called."""
        return type(self).validate is not Training.validate

    def validate(self) -> Mapping[str, float]:
        """Validate the present weights and return the metrics, with the same data every time.

        Called before and after changes that are checked.
        """
        raise NotImplementedError(self.validate_by)

    @property
    def validation_batches(self) -> int | None:
        """How many batches a validation has, if it can also take fewer by :meth:`validate_share`."""
        return None

    def validate_share(self, most: int) -> Mapping[str, float]:
        """As :meth:`validate`, with about ``most`` batches at equal distances."""
        raise NotImplementedError

    def own_name(self, name: str, metrics: Collection[str]) -> str:
        """What the user calls the metric ``name`` of a validation with these ``metrics``."""
        return name

    def record(self, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a validation that was made for a change, if the change was kept."""

    def logged(self) -> Mapping[str, float]:
        """Return metrics that a trigger may read in addition to those of the validation, with their present values.

        It is called in each validation, and all that it returns counts as new and as of the present ranks. What is
        logged at other times belongs into ``driver.logged.log({name: value})``, when it is logged: a trigger reads it
        once, and after a change waits for the next.
        """
        return {}

    def logs_later(self, name: str) -> bool:
        """Whether training, which has not logged the metric ``name``, may yet do so: a trigger then waits for it."""
        return False

    # For a trainer that keeps factors in tensors of its own

    def gathered(self) -> AbstractContextManager[None]:
        """A block in which the layers of ``model``, and the states of ``optimizers``, have their present values."""
        return nullcontext()

    def put_back(self) -> None:
        """Pass factors and states, which a change has just replaced, on to where they are trained."""

    def importance_of(self, layers: Mapping[str, RankedLayer]) -> ImportanceSums:
        """What sums the importance of the layers of ``model``."""
        return Importance(layers)

    def steps_of(self, importance: ImportanceSums) -> MeasuredSteps:
        """What passes the steps of the optimizers to ``importance``, which :meth:`importance_of` has made."""
        assert isinstance(importance, Importance)
        return LastSteps(importance, self.optimizers, adapter_parameters(self.model))

    def modules(self) -> Iterable[nn.Module]:
        """The modules that a validation runs."""
        return self.model.modules()

    def generators(self) -> Iterable[torch.Generator]:
        """The generators of random numbers from which a validation draws, beside those of Python, numpy and torch."""
        return ()

    def tell(self, event: RankEvent) -> None:
        """Pass ``event`` to whatever reports changes, such as callbacks."""

    def warn(self, message: str) -> None:
        """Warn the user, once for all processes."""
        warnings.warn(message, stacklevel=2)
