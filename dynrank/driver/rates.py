"""The learning rates after a change of rank: a ramp, a factor for adapters, a warning of too low a rate."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import sqrt
from statistics import mean
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dynrank.driver.training import Training
from dynrank.errors import ConfigurationError
from dynrank.schedules import How

LOW_RATE = 0.1  # below this share of the starting learning rate, a drop has little left to recover with


def rate_factor(how: How, before: Mapping[str, int], after: Mapping[str, int]) -> float:
    """What ``how`` multiplies the adapters' rates by, at a change from the ranks ``before`` to those ``after``."""
    if how.rate_after == "sqrt":
        return sqrt(mean(before.values()) / mean(after.values()))
    return how.rate_after


class Rates:
    """Multiplies the rates of an optimizer's steps: by a factor where they are of adapters, and along a ramp.

    The ramp is 1/(steps + 1), 2/(steps + 1), ... for the next ``steps`` optimizer steps. Rates are changed just before
    a step and put back just after it, so schedulers never see the changed values.

    Args:
        optimizer: the optimizer to hook.
        adapters: the factors of all LoRA layers.
        factor: of the rates of groups that hold these.
        steps: length of the ramp, optimizer steps.
        done: steps of the ramp that were made before (on resume).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        adapters: Collection[nn.Parameter],
        factor: float = 1.0,
        steps: int = 0,
        done: int = 0,
    ) -> None:
        self.factor, self.steps, self.done = factor, steps, done
        self._adapters = {id(parameter) for parameter in adapters}
        self._rates: list[Any] = []
        before, after = optimizer.register_step_pre_hook, optimizer.register_step_post_hook
        self._handles = [before(self._change), after(self._restore)]

    def remove(self) -> None:
        """Leave the rates alone from now on."""
        for handle in self._handles:
            handle.remove()

    @property
    def _acts(self) -> bool:  # the hooks stay after that: torch cannot lose one while it runs them
        return self.factor != 1.0 or self.done < self.steps

    def _change(self, optimizer: Optimizer, *_: Any) -> None:
        if self._acts:
            self._rates = [group["lr"] for group in optimizer.param_groups]
            ramp = min(1.0, (self.done + 1) / (self.steps + 1))
            for group in optimizer.param_groups:
                of_adapters = any(id(parameter) in self._adapters for parameter in group["params"])
                group["lr"] = group["lr"] * ramp * (self.factor if of_adapters else 1.0)

    def _restore(self, optimizer: Optimizer, *_: Any) -> None:
        if self._acts:
            for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate
            self.done += 1


def check_groups(optimizer: Optimizer, adapters: Collection[nn.Parameter], how: How) -> None:
    """Refuse a factor for the adapters' rates where they share a param group with other parameters.

    Raises:
        ConfigurationError: if they do.
    """
    known = {id(parameter) for parameter in adapters}
    for number, group in enumerate(optimizer.param_groups if how.rate_after != 1.0 else ()):
        others = sum(id(parameter) not in known for parameter in group["params"])
        if 0 < others < len(group["params"]):
            raise ConfigurationError(
                f"rate_after={how.rate_after} multiplies the adapters' learning rates alone, but param group {number} "
                f"holds {others} other parameters, too: give the adapters a group of their own, or set rate_after=1 "
                "(schedule.rate_after)"
            )


def warn_of_low_rate(training: Training) -> None:
    """Warn if every learning rate has decayed so far that the model cannot recover from a change."""
    groups = [group for optimizer in training.optimizers for group in optimizer.param_groups]
    rates = [(float(group["lr"]), float(group.get("initial_lr", group["lr"]))) for group in groups]
    share = min((now / start for now, start in rates if start > 0), default=1.0)
    if share < LOW_RATE:
        training.warn(
            f"the learning rate at the change of rank is {share:.1%} of its start, too little to recover with; "
            "set an earlier schedule.deadline or a later decay (optimizer.decay)"
        )
