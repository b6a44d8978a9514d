"""The learning rates of adapters after a change of rank: multiplied by a factor within each optimizer step."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import sqrt
from statistics import mean
from typing import Any
from weakref import WeakValueDictionary

from torch import nn
from torch.optim import Adafactor, Optimizer
from torch.utils.hooks import RemovableHandle

from dynrank.change.closures import Closure, with_closure
from dynrank.distributed.zero import ZeroOptimizer, stepping
from dynrank.errors import ConfigurationError
from dynrank.schedules import How

# Keys under which some optimizers keep state in the param group instead of in each parameter's state.
_GROUP_STATE = {"k", "weight_sum", "d"}


def factor_of_change(how: How, before: Mapping[str, int], after: Mapping[str, int]) -> float:
    """Factor of the adapters' learning rates for a change from the ranks ``before`` to the ranks ``after``."""
    if how.lr_factor == "sqrt":
        return sqrt(mean(before.values()) / mean(after.values()))
    return how.lr_factor


class LearningRates:
    """Multiplies the learning rates of adapters by a factor in each step of an optimizer, and nowhere else.

    Just before a step the groups of adapters get the multiplied rate; where a group also has other parameters, its
    adapters get a group of their own. Just after the step, and while a closure runs in it, every group is as it was,
    with the same objects. So whatever a program, a scheduler or a callback reads, sets or multiplies is the rate
    without the factor.

    Args:
        optimizer: the optimizer to hook, until :meth:`remove`.
        adapters: the factors of all LoRA layers.
        factor: the factor at first.

    Attributes:
        factor: the factor of the next step.
        used: {number of a param group: the rate that its adapters had in the last step}, if the factor was not 1.

    Raises:
        ConfigurationError: if another one is hooked into this optimizer.
    """

    def __init__(self, optimizer: Optimizer, adapters: Collection[nn.Parameter], factor: float) -> None:
        self._optimizer = optimizer
        self._handles: list[RemovableHandle] = []
        inside = stepping(optimizer)
        earlier = _HOOKED.get(id(inside))
        # Each would raise the rates that the other restores.
        if earlier is not None and stepping(earlier._optimizer) is inside and earlier._handles:
            raise ConfigurationError(
                "another rank schedule drives this optimizer; join the stages of both in one list, or both models in a "
                "torch.nn.ModuleDict. After a run that was interrupted, as a cell of a notebook, call driver.abort(), "
                "or make a new optimizer",
                "callbacks",
            )
        _HOOKED[id(inside)] = self
        self.factor = factor
        self.used: dict[int, Any] = {}
        self._adapters = {id(parameter) for parameter in adapters}
        # (group, its rate, its parameters) of all groups, during a step.
        self._outside: list[tuple[Any, Any, list[nn.Parameter]]] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._begin),
            optimizer.register_step_post_hook(lambda *_: self._end()),
            # A step that has failed has no end, and a checkpoint may be written after it.
            optimizer.register_state_dict_pre_hook(lambda _: self._end()),
        ]

    def remove(self) -> None:
        """Multiply no longer."""
        self._end()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _begin(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Multiply the rates for the step that begins; returns its arguments if there is a closure among them."""
        self._end()
        self._multiply()
        return with_closure(args, kwargs, self._as_outside)

    def _as_outside(self, closure: Closure) -> Closure:
        """``closure`` with the groups as they are outside of a step: Lightning calls hooks in it, which set rates."""

        def run() -> Any:
            self._end()
            result = closure()
            self._multiply()
            return result

        return run

    def _multiply(self) -> None:
        self.used = {}
        if self.factor == 1.0:
            return
        groups = self._optimizer.param_groups
        self._outside = [(group, group["lr"], group["params"]) for group in groups]
        for number, (group, rate, parameters) in enumerate(self._outside):
            own = [parameter for parameter in parameters if id(parameter) in self._adapters]
            if not own:
                continue
            self.used[number] = rate * self.factor
            if len(own) == len(parameters):
                group["lr"] = self.used[number]
            else:
                group["params"] = [parameter for parameter in parameters if id(parameter) not in self._adapters]
                groups.append({**group, "params": own, "lr": self.used[number]})

    def _end(self) -> None:
        """Restore the groups as they were before the step; they are if none is running."""
        outside = self._outside
        self._outside = []
        if outside:
            del self._optimizer.param_groups[len(outside) :]
        for number, (group, rate, parameters) in enumerate(outside):
            group["params"] = parameters
            # After a step that has failed the program may have set another rate.
            if group["lr"] is self.used.get(number):
                group["lr"] = rate


# {id of an optimizer: what was last hooked into it}; the hooks keep these alive as long as the optimizer.
_HOOKED: WeakValueDictionary[int, LearningRates] = WeakValueDictionary()


def check_groups(optimizer: Optimizer, adapters: Collection[nn.Parameter], how: How) -> None:
    """Refuse a factor for adapters whose optimizer computes its rates, or whose param group cannot be split for a step.

    A group with other parameters is split for the step, which state in the group forbids.
    """
    known = {id(parameter) for parameter in adapters}
    name = type(optimizer).__name__
    for number, group in enumerate(optimizer.param_groups if how.lr_factor != 1.0 else ()):
        others = sum(id(parameter) not in known for parameter in group["params"])
        if others == len(group["params"]):
            continue
        if group.get("relative_step", False):
            raise ConfigurationError(
                f"lr_factor={how.lr_factor} multiplies the adapters' learning rates, but {name} computes its own; "
                f"set lr_factor=1, or {name}(..., lr=1e-3, relative_step=False)",
                "lr_factor",
            )
        # The d of torch's Adafactor is a setting.
        state = _GROUP_STATE & group.keys() if not isinstance(optimizer, Adafactor) else ()
        in_zero = isinstance(optimizer, ZeroOptimizer)
        if others and (state or in_zero):
            why = "DeepSpeed steps a param group as one tensor" if in_zero else f"{name} keeps state in a param group"
            raise ConfigurationError(
                f"lr_factor={how.lr_factor} multiplies the adapters' learning rates alone, but {why}, and group "
                f"{number} also has {others} other parameters. Set lr_factor=1 (early_budget(4, how=How())), or give "
                "the optimizer two groups (under the Trainer in create_optimizer of a derived class): {'params': "
                "list(dynrank.adapter_parameters(model))}, and {'params': [...]} of all others that are trained",
                "lr_factor",
            )
