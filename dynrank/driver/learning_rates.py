"""The learning rates after a change of rank: a factor for adapters, and a warning if the rate is too low."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from math import sqrt
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adafactor, Optimizer

from dynrank.distributed.zero import ZeroOptimizer
from dynrank.driver.schedulers import keep_limit, limited_function, multiply, multiply_bases, of_torch, shown_rate
from dynrank.driver.training import Training
from dynrank.errors import ConfigurationError
from dynrank.schedules import How

# Below this share of the starting learning rate a model cannot recover from a cut.
LOW_RATE = 0.1


def factor_of_change(how: How, before: Mapping[str, int], after: Mapping[str, int]) -> float:
    """Factor of the adapters' learning rates for a change from the ranks ``before`` to the ranks ``after``."""
    if how.lr_factor == "sqrt":
        return sqrt(mean(before.values()) / mean(after.values()))
    return how.lr_factor


# The key in a param group of the factor that its rate contains. So a checkpoint stores the factor with that rate.
LR_FACTOR = "dynrank_lr_factor"
# The factor of a group whose rate the program sets by itself, so that it contains none, and never will.
_SET_BY_PROGRAM = 0.0


class LearningRates:
    """Multiplies the learning rates of adapters by a factor.

    Where a param group has adapters alone and its schedulers are torch's, the factor is multiplied into the group's
    rate and the schedulers' base rates. So everybody who reads them sees the rate that is used, and schedulers go on
    as if they had been made with the multiplied rate. (Limits such as ``eta_min`` stay.) A group without a scheduler
    has its rate multiplied, too.

    In other groups rates are changed just before a step of the optimizer and restored just after it: adapters get their
    own group during the step, and the factor applies to no other parameter. So it is for all groups if the schedulers
    are unknown: they, or the loop itself, may set absolute rates. And so it is for a group from the first step on whose
    rate is neither the one that was left in it nor a scheduler's: the program sets it, without the factor.

    Args:
        optimizer: the optimizer to hook.
        adapters: the factors of all LoRA layers.
        factor: factor of the adapters' rates, in total; a group may contain a part of it already.
        training: the run, whose schedulers may be replaced; None: its schedulers are unknown.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        adapters: Collection[nn.Parameter],
        factor: float,
        training: Training | None = None,
    ) -> None:
        self.factor = factor
        self._optimizer = optimizer
        self._adapters = {id(parameter) for parameter in adapters}
        self._training = training
        # The rate of each group when it was last looked at; None: it cannot be read without waiting for a device.
        self._left: list[float | None] = []
        # Groups that a scheduler rules that the loop has not named: it goes on from the rate that it found.
        self._ruled_by_others: set[int] = set()
        # The original rate and parameters of each group, during a step.
        self._groups: list[tuple[Any, list[nn.Parameter]]] = []
        before = optimizer.register_step_pre_hook
        after = optimizer.register_step_post_hook
        loaded = optimizer.register_load_state_dict_post_hook
        # After an exception in a step's closure the rates are still changed, and a checkpoint may be written then.
        saved = optimizer.register_state_dict_pre_hook(lambda _: self.restore())
        self._handles = [before(self._begin), after(lambda *_: self.restore()), saved, loaded(lambda _: self._leave())]
        for index, group in enumerate(optimizer.param_groups):
            # A resumed run has made its schedulers as the first one did, and then loaded their base rates.
            for scheduler in self._with_limit() if self._is_of_adapters(group) else ():
                if isinstance(limited_function(scheduler, index), partial):
                    keep_limit(scheduler, index, _contained(group))
        self.multiply(1.0)

    def multiply(self, more: float) -> None:
        """Multiply the adapters' rates by ``more`` from now on."""
        self.factor *= more
        mark(self._optimizer)
        self._notice()
        schedulers = self._known_schedulers()
        for index, group in enumerate(self._optimizer.param_groups if schedulers is not None else ()):
            is_set = group[LR_FACTOR] == _SET_BY_PROGRAM or index in self._ruled_by_others
            if self._is_of_adapters(group) and not is_set:
                multiply(group, index, self._missing(group), schedulers or [], self._with_limit())
                group[LR_FACTOR] = self.factor
        self._leave()

    def of_next_step(self) -> list[Any]:
        """The rate of each param group in the next step; the adapters' rate if a group also has other parameters."""
        self._notice()
        raised = [self._missing(g) != 1.0 and bool(self._parted(g["params"])[0]) for g in self._optimizer.param_groups]
        groups = zip(self._optimizer.param_groups, raised, strict=True)
        return [group["lr"] * self._missing(group) if up else group["lr"] for group, up in groups]

    def remove(self) -> None:
        """Remove the hooks; what the groups contain of the factor stays there."""
        self.restore()
        for handle in self._handles:
            handle.remove()

    def _missing(self, group: Mapping[str, Any]) -> float:
        """The part of the factor that the group's rate does not contain."""
        return self.factor / _contained(group)

    def _known_schedulers(self) -> list[Any] | None:
        """The optimizer's present schedulers, with those inside them; None: unknown."""
        given = None if self._training is None else self._training.present_schedulers()
        return None if given is None else of_torch(given, self._optimizer)

    def _with_limit(self) -> list[Any]:
        """The schedulers that may have a limit as a share of the base rate, which the user has given as a rate."""
        if self._training is None or not self._training.limits_are_rates:
            return []
        return self._known_schedulers() or []

    def _leave(self) -> None:
        """Remember the rate of each group."""
        self._left = [_number(group["lr"]) for group in self._optimizer.param_groups]

    def _notice(self) -> None:
        """Find the groups whose rate is neither the one that was left in them nor a scheduler's."""
        # A graph of a compiled step would contain the rates as constants.
        if torch.compiler.is_compiling() or self._groups:
            return
        for index, (group, left) in enumerate(zip(self._optimizer.param_groups, self._left, strict=False)):
            now = _number(group["lr"])
            if now is None or left is None or now == left:
                continue
            schedulers = self._known_schedulers()
            if schedulers is None or any(shown_rate(scheduler, index) == now for scheduler in schedulers):
                continue
            if not self._is_of_adapters(group):
                continue
            if schedulers and not (self._training is not None and self._training.knows_schedulers):
                self._ruled_by_others.add(index)
            elif group.get(LR_FACTOR, 1.0) != _SET_BY_PROGRAM:
                multiply_bases(group, index, 1.0 / _contained(group), schedulers, self._with_limit())
                group[LR_FACTOR] = _SET_BY_PROGRAM
        self._leave()

    def _begin(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Raise the rates of the step that begins; returns its arguments if the closure is among them."""
        self.restore()
        self._notice()
        self._change()
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._watched(kwargs["closure"])}
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._watched(args[1]), *args[2:]), kwargs
        return None

    def _watched(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """``closure`` with the rates as they are outside of a step: Lightning calls hooks in it, which may set them."""

        def run() -> Any:
            self.restore()
            result = closure()
            self._notice()
            self._change()
            return result

        return run

    def _change(self) -> None:
        """Raise the rates of adapters for a step, each group's others in a group of their own."""
        groups = self._optimizer.param_groups
        if all(self._missing(group) == 1.0 for group in groups):
            return
        self._groups = [(group["lr"], group["params"]) for group in groups]
        for group in [*groups]:
            own, others = self._parted(group["params"])
            if own and others:
                group["params"] = others
                groups.append({**group, "params": own, "lr": group["lr"] * self._missing(group)})
            elif own:
                group["lr"] = group["lr"] * self._missing(group)

    def restore(self) -> None:
        """Restore the groups to their state before the present step, if a step is running."""
        groups = self._groups
        self._groups = []
        if groups:
            del self._optimizer.param_groups[len(groups) :]
            for group, (rate, parameters) in zip(self._optimizer.param_groups, groups, strict=True):
                group["lr"] = rate
                group["params"] = parameters

    def _is_of_adapters(self, group: Mapping[str, Any]) -> bool:
        """Whether the group has adapters, and nothing else."""
        own, others = self._parted(group["params"])
        return bool(own) and not others

    def _parted(self, parameters: Sequence[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """(adapters, others) among ``parameters``."""
        own = [parameter for parameter in parameters if id(parameter) in self._adapters]
        return own, [parameter for parameter in parameters if id(parameter) not in self._adapters]


def mark(optimizer: Optimizer) -> None:
    """Let every param group say which factor its rate contains; a new one contains none."""
    for group in optimizer.param_groups:
        group.setdefault(LR_FACTOR, 1.0)


def begin_anew(optimizer: Optimizer) -> None:
    """Let the present rates be those of a new schedule, whatever an earlier one has multiplied into them."""
    for group in optimizer.param_groups:
        if group.get(LR_FACTOR) != _SET_BY_PROGRAM:
            group.pop(LR_FACTOR, None)


def _contained(group: Mapping[str, Any]) -> float:
    """The factor that the group's rate contains."""
    # A group that was added after the start contains none.
    return float(group.get(LR_FACTOR, 1.0)) or 1.0


def _number(rate: Any) -> float | None:
    """The rate; None if the optimizer computes its own, or if a device would have to be waited for."""
    if rate is None or (isinstance(rate, Tensor) and rate.device.type != "cpu"):
        return None
    return float(rate)


# Keys under which some optimizers keep state in the param group instead of in each parameter's state.
_GROUP_STATE = {"k", "weight_sum", "d"}


def check_groups(optimizer: Optimizer, adapters: Collection[nn.Parameter], how: How) -> None:
    """Refuse a factor for adapters whose optimizer computes its rates, or whose param group cannot be split for a step.

    A group with other parameters is split for the step, which state in the group forbids.
    """
    known = {id(parameter) for parameter in adapters}
    name = type(optimizer).__name__
    for number, group in enumerate(optimizer.param_groups if how.lr_factor != 1.0 else ()):
        others = sum(id(parameter) not in known for parameter in group["params"])
        if others < len(group["params"]) and group.get("relative_step", False):
            raise ConfigurationError(
                f"lr_factor={how.lr_factor} multiplies the adapters' learning rates, but {name} computes its own; "
                f"set lr_factor=1, or {name}(..., lr=1e-3, relative_step=False)",
                "lr_factor",
            )
        if 0 < others < len(group["params"]) and isinstance(optimizer, ZeroOptimizer):
            raise ConfigurationError(
                f"lr_factor={how.lr_factor} multiplies the adapters' learning rates alone, and DeepSpeed steps them as "
                f"one tensor with {others} other parameters of param group {number}. Set lr_factor=1 (early_budget(4, "
                "how=How())), or give the others a group of their own, in a class derived from the Trainer:\n"
                "  def create_optimizer(self, model=None):\n"
                "      own = list(dynrank.adapter_parameters(self.model))\n"
                "      ids = {id(p) for p in own}\n"
                "      rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in ids]\n"
                '      self.optimizer = torch.optim.AdamW([{"params": own}, {"params": rest}], '
                "lr=self.args.learning_rate)\n"
                "      return self.optimizer",
                "lr_factor",
            )
        # The d of torch's Adafactor is a setting.
        state = _GROUP_STATE & group.keys() if not isinstance(optimizer, Adafactor) else ()
        if 0 < others < len(group["params"]) and state:
            raise ConfigurationError(
                f"lr_factor={how.lr_factor} multiplies the adapters' learning rates alone, but {name} keeps state in "
                f"param group {number}, which also has {others} other parameters. Set lr_factor=1, "
                "or give the optimizer two groups:\n"
                "  own = list(dynrank.adapter_parameters(model))\n"
                "  ids = {id(p) for p in own}\n"
                "  rest = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]\n"
                f'  {name}([{{"params": own}}, {{"params": rest}}], lr={group["lr"]:g})',
                "lr_factor",
            )


def warn_of_low_rate(training: Training) -> None:
    """Warn if a learning rate has decayed so far that the model cannot recover from a change."""
    groups = [group for optimizer in training.optimizers for group in optimizer.param_groups]
    # An optimizer that computes its own rate may have None.
    rates = [(float(group["lr"] or 0.0), float(group.get("initial_lr", group["lr"]) or 0.0)) for group in groups]
    share = min((now / start for now, start in rates if start > 0), default=1.0)
    if share < LOW_RATE:
        training.warn(
            f"the learning rate at the change of rank is {share:.1%} of its start, too low to recover from the change; "
            "set an earlier deadline or a later decay"
        )
