"""The learning rates after a change of rank: a factor for adapters, and a warning if the rate is too low."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import sqrt
from statistics import mean
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dynrank.driver.training import Training
from dynrank.errors import ConfigurationError
from dynrank.schedules import How

# Below this share of the starting learning rate a model cannot recover from a cut.
LOW_RATE = 0.1


def rate_factor(how: How, before: Mapping[str, int], after: Mapping[str, int]) -> float:
    """Factor of the adapters' learning rates for a change from the ranks ``before`` to the ranks ``after``."""
    if how.rate_after == "sqrt":
        return sqrt(mean(before.values()) / mean(after.values()))
    return how.rate_after


class Rates:
    """Multiplies the learning rates of adapters by a factor.

    Rates are changed just before a step of the optimizer and restored just after it, so schedulers never see the
    changed values. Adapters that share a param group with other parameters get their own group during the step. So the
    factor applies to no other parameter, and schedulers and checkpoints see the groups that the user has made.

    Args:
        optimizer: the optimizer to hook.
        adapters: the factors of all LoRA layers.
        factor: factor of the adapters' rates.
    """

    def __init__(self, optimizer: Optimizer, adapters: Collection[nn.Parameter], factor: float) -> None:
        self.factor = factor
        self._optimizer, self._adapters = optimizer, {id(parameter) for parameter in adapters}
        # The original rate and parameters of each group, during a step.
        self._groups: list[tuple[Any, list[nn.Parameter]]] = []
        before, after = optimizer.register_step_pre_hook, optimizer.register_step_post_hook
        # After an exception in a step's closure the rates are still changed, and a checkpoint may be written then.
        saved = optimizer.register_state_dict_pre_hook(lambda _: self.restore())
        self._handles = [before(self._change), after(lambda *_: self.restore()), saved]

    def of_next_step(self) -> list[float]:
        """The rate of each param group in the next step; the adapters' rate if a group also has other parameters."""
        groups = self._optimizer.param_groups
        return [float(g["lr"]) * (self.factor if self._parted(g["params"])[0] else 1.0) for g in groups]

    def remove(self) -> None:
        """Remove the hooks; the rates are no longer changed."""
        self.restore()
        for handle in self._handles:
            handle.remove()

    def _change(self, optimizer: Optimizer, *_: Any) -> None:
        if self.factor == 1.0:
            return
        self.restore()
        self._groups = [(group["lr"], group["params"]) for group in optimizer.param_groups]
        for group in [*optimizer.param_groups]:
            own, others = self._parted(group["params"])
            if own and others:
                group["params"] = others
                optimizer.param_groups.append({**group, "params": own, "lr": group["lr"] * self.factor})
            elif own:
                group["lr"] = group["lr"] * self.factor

    def restore(self) -> None:
        """Restore the groups to their state before the present step, if a step is running."""
        groups, self._groups = self._groups, []
        if groups:
            del self._optimizer.param_groups[len(groups) :]
            for group, (rate, parameters) in zip(self._optimizer.param_groups, groups, strict=True):
                group["lr"], group["params"] = rate, parameters

    def _parted(self, parameters: Sequence[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """(adapters, others) among ``parameters``."""
        own = [parameter for parameter in parameters if id(parameter) in self._adapters]
        return own, [parameter for parameter in parameters if id(parameter) not in self._adapters]


# Keys under which some optimizers keep state in the param group instead of in each parameter's state.
_GROUP_STATE = {"k", "weight_sum", "d"}


def check_groups(optimizer: Optimizer, adapters: Collection[nn.Parameter], how: How) -> None:
    """Refuse a factor for adapters that share a param group whose own state forbids splitting it for a step."""
    known = {id(parameter) for parameter in adapters}
    for number, group in enumerate(optimizer.param_groups if how.rate_after != 1.0 else ()):
        others = sum(id(parameter) not in known for parameter in group["params"])
        if 0 < others < len(group["params"]) and _GROUP_STATE & group.keys():
            name = type(optimizer).__name__
            raise ConfigurationError(
                f"rate_after={how.rate_after} multiplies the adapters' learning rates alone, but {name} keeps state in "
                f"param group {number}, which also has {others} other parameters. Set rate_after=1 "
                "(schedule.how.rate_after), or give the optimizer two groups:\n"
                "  own = list(dynrank.adapter_parameters(model))\n"
                "  ids = {id(p) for p in own}\n"
                "  rest = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]\n"
                f'  {name}([{{"params": own}}, {{"params": rest}}], lr={group["lr"]:g})'
            )


def warn_of_low_rate(training: Training) -> None:
    """Warn if a learning rate has decayed so far that the model cannot recover from a change."""
    groups = [group for optimizer in training.optimizers for group in optimizer.param_groups]
    rates = [(float(group["lr"]), float(group.get("initial_lr", group["lr"]))) for group in groups]
    share = min((now / start for now, start in rates if start > 0), default=1.0)
    if share < LOW_RATE:
        training.warn(
            f"the learning rate at the change of rank is {share:.1%} of its start, too low to recover from the change; "
            "set an earlier schedule.deadline or a later decay (optimizer.decay)"
        )
