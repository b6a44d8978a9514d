"""The learning rates after a change of rank: a factor for adapters, and a warning if the rate is too low."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import isclose, sqrt
from statistics import mean
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Optimizer

from dynrank.distributed.zero import ZeroOptimizer
from dynrank.driver.closures import Closure, with_closure
from dynrank.driver.schedulers import (
    base_rates,
    follow_group,
    has_kept_limit,
    keep_limit,
    limit_as_share,
    multiply,
    multiply_bases,
    of_torch,
    shown_rate,
)
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


# The key in a param group of the factor that its rate contains, so that a checkpoint stores it with that rate. It is
# negative if no factor goes into this rate any more, because somebody else than known schedulers has set it.
LR_FACTOR = "dynrank_lr_factor"

# (rate, factor that it contains, base rates of its schedulers) of a param group, in a checkpoint.
SavedRate = tuple[float, float, dict[str, float]]


class LearningRates:
    """Multiplies the learning rates of adapters by a factor.

    The rule: each step of an adapter has the rate that the program would use without changes of rank, times the factor.
    The factor is in one of two places, for each param group:

    - *In the rate*, where everybody who reads it sees the rate that is used. So it is where a group has adapters alone,
      and all its schedulers are known classes of torch. The group's rate and the schedulers' base rates are multiplied,
      so they go on as if they had been made with the multiplied rate; limits that the user has given as rates
      (``eta_min``) stay.
    - *In the step*, elsewhere: where other parameters are in the group, where there is no scheduler, or an unknown one.
      Just before a step of the optimizer adapters get a group of their own, with the multiplied rate, and just after it
      the group is restored. So whatever the program reads, sets or multiplies is the rate without the factor, and the
      factor applies to no other parameter.

    A rate beside known schedulers that none of them has set was set by the program. So was, under a trainer, a base
    rate of a scheduler that has changed. From then on factors of this group are made in the step. What the program has
    set counts as set without a factor under a trainer. In a plain loop it counts as set with the factors so far,
    because a scheduler that the loop has not named may have begun at the rate that it found. If the old rate did
    contain a factor, a warning says so: the program may mean the other.

    Args:
        optimizer: the optimizer to hook.
        adapters: the factors of all LoRA layers.
        factor: factor of the adapters' rates, in total; a group may contain a part of it already.
        training: the run, whose schedulers may be replaced; None: its schedulers are unknown.
        saved: what :meth:`of_groups` returned when the checkpoint was written that this run goes on from.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        adapters: Collection[nn.Parameter],
        factor: float,
        training: Training | None = None,
        saved: Sequence[SavedRate] = (),
    ) -> None:
        self.factor = factor
        self._optimizer = optimizer
        self._adapters = {id(parameter) for parameter in adapters}
        self._training = training
        # The rate of each group when it was last looked at; None: it cannot be read without waiting for a device.
        self._left: list[float | None] = []
        # Under a trainer, the base rates of each group at that time, and the schedulers that have them.
        self._left_bases: list[dict[str, float]] = []
        self._left_schedulers: list[Any] = []
        # {number of a group: the adapters' rate in the last step}, where it was not the group's.
        self.raised: dict[int, Any] = {}
        # The original rate and parameters of each group, during a step.
        self._groups: list[tuple[Any, list[nn.Parameter]]] = []
        # A run that was interrupted, as a cell of a notebook, has left its hooks: each would raise what the other has.
        earlier = _HOOKED.get(id(optimizer))
        if earlier is not None and earlier._optimizer is optimizer:
            earlier._give_way(self._adapters)
        _HOOKED[id(optimizer)] = self
        before = optimizer.register_step_pre_hook
        after = optimizer.register_step_post_hook
        loaded = optimizer.register_load_state_dict_post_hook
        # After an exception in a step's closure the rates are still changed, and a checkpoint may be written then.
        state = optimizer.register_state_dict_pre_hook(lambda _: self.restore())
        self._handles = [before(self._begin), after(lambda *_: self.restore()), state, loaded(lambda _: self._leave())]
        mark_as_loaded(optimizer, saved)
        for index, group in enumerate(optimizer.param_groups):
            # A resumed run has made its schedulers as the first one did, and then loaded their base rates.
            schedulers = self._known_schedulers() if self._is_of_adapters(group) else []
            contained = _contained(group) if LR_FACTOR in group else None
            follow_group(group, index, schedulers, contained, factor, self._limits_are_rates)
            for scheduler in schedulers:
                if not has_kept_limit(scheduler, index):
                    keep_limit(scheduler, index, _contained(group), self._limits_are_rates)
        if self._knows_schedulers:
            # A program may edit the rates of a checkpoint that a trainer loads.
            pairs = [*zip(optimizer.param_groups, saved, strict=False)]
            self._left = [rate if LR_FACTOR in group else None for group, (rate, _, _) in pairs]
            self._left_bases = [bases if LR_FACTOR in group else {} for group, (_, _, bases) in pairs]
            self._left_schedulers = self._known_schedulers()
        self.multiply(1.0)

    def multiply(self, more: float) -> None:
        """Multiply the adapters' rates by ``more`` from now on."""
        self.factor *= more
        mark(self._optimizer)
        self._notice()
        schedulers = self._known_schedulers()
        for index, group in enumerate(self._optimizer.param_groups if schedulers else ()):
            if self._is_of_adapters(group) and group[LR_FACTOR] > 0:
                if more != 1.0:
                    self._warn_of_limit(index, schedulers, more)
                multiply(group, index, self._missing(group), schedulers, self._limits_are_rates)
                group[LR_FACTOR] = self.factor
        self._leave()

    def of_groups(self) -> list[SavedRate]:
        """What a checkpoint needs of each param group."""
        self.restore()
        groups = self._optimizer.param_groups
        rates = [(float(group["lr"] or 0.0), float(group.get(LR_FACTOR, 1.0))) for group in groups]
        return [(*rate, bases) for rate, bases in zip(rates, self._base_rates(self._known_schedulers()), strict=True)]

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
        self._handles = []

    def _give_way(self, adapters: Collection[int]) -> None:
        """Remove the hooks for another run of the same ``adapters``; refuse one of others in the same optimizer."""
        if self._handles and self._adapters.isdisjoint(adapters):
            raise ConfigurationError(
                "another schedule changes ranks of other layers in this optimizer, and each would raise the rates that "
                "the other restores; drive both models by one schedule (torch.nn.ModuleDict), or make an optimizer for "
                "each"
            )
        self.remove()

    def _missing(self, group: Mapping[str, Any]) -> float:
        """The part of the factor that the group's rate does not contain."""
        return self.factor / _contained(group)

    def _known_schedulers(self) -> list[Any]:
        """The optimizer's present schedulers, with those inside them; none if one of them is unknown."""
        given = None if self._training is None else self._training.present_schedulers()
        return of_torch(given or [], self._optimizer)

    @property
    def _knows_schedulers(self) -> bool:
        return self._training is not None and self._training.knows_schedulers

    @property
    def _limits_are_rates(self) -> bool | None:
        return None if self._training is None else self._training.limits_are_rates

    def _warn_of_limit(self, index: int, schedulers: list[Any], more: float) -> None:
        """Warn that a limit of group number ``index`` is multiplied that the user may have given as a rate."""
        share = next((found for s in schedulers if (found := limit_as_share(s, index)) is not None), None)
        if share is not None and self._limits_are_rates is None:
            assert self._training is not None
            self._training.warn(
                f"the learning rate of param group {index} falls to {share:.3g} of its highest, and a change of rank "
                f"multiplies both by {more:.3g}. If that limit was given as a rate (min_lr) that shall stay, use "
                "torch's CosineAnnealingLR(eta_min=...), or the Trainer's lr_scheduler_kwargs={'min_lr': ...}"
            )

    def _leave(self) -> None:
        """Remember the rate of each group, and from which ones its schedulers compute it."""
        self._left = [_number(group["lr"]) for group in self._optimizer.param_groups]
        if self._knows_schedulers:
            self._left_schedulers = self._known_schedulers()
            self._left_bases = self._base_rates(self._left_schedulers)

    def _notice(self) -> None:
        """Find the groups whose rate is neither the one that was left in them nor a known scheduler's.

        A program can also set the base rate of a scheduler.
        """
        # A graph of a compiled step would contain the rates as constants.
        if torch.compiler.is_compiling() or self._groups:
            return
        schedulers = self._known_schedulers()
        changed = self._changed_bases(schedulers)
        for index, (group, left) in enumerate(zip(self._optimizer.param_groups, self._left, strict=False)):
            now = _number(group["lr"])
            if not schedulers or now is None or group.get(LR_FACTOR, 1.0) < 0:
                continue
            bases = changed.get(index, {})
            # A program that also lets the scheduler show what it has set gives all of these one value.
            is_shown = now not in bases.values() and any(
                shown_rate(scheduler, index) == now for scheduler in schedulers
            )
            is_set = left is not None and now != left and not is_shown
            if (is_set or bases) and self._is_of_adapters(group):
                self._take_as_set(group, index, schedulers, bases, is_set=is_set)
        self._leave()

    def _base_rates(self, schedulers: list[Any]) -> list[dict[str, float]]:
        """The :func:`base_rates` of each group; none where they cannot be read without waiting for a device."""
        groups = self._optimizer.param_groups
        return [{} if _number(g["lr"]) is None else base_rates(g, n, schedulers) for n, g in enumerate(groups)]

    def _changed_bases(self, schedulers: list[Any]) -> dict[int, dict[str, float]]:
        """{number of a group: the base rates that the program has set since they were left}."""
        # New schedulers have base rates of their own.
        if not self._knows_schedulers or [*map(id, schedulers)] != [*map(id, self._left_schedulers)]:
            return {}
        pairs = zip(self._left_bases, self._base_rates(schedulers), strict=False)
        return {number: _changed(before, now) for number, (before, now) in enumerate(pairs)}

    def _take_as_set(
        self, group: dict[str, Any], index: int, schedulers: list[Any], bases: Mapping[str, float], *, is_set: bool
    ) -> None:
        """Take the rates of ``group``, number ``index``, as some that the program has set beside known schedulers.

        It has set the base rates ``bases``, and (``is_set``) the group's rate: these contain no factor.
        """
        assert self._training is not None
        contained = _contained(group)
        group[LR_FACTOR] = -contained
        if self._knows_schedulers:
            restore = multiply_bases if is_set else multiply
            restore(group, index, 1.0 / contained, schedulers, self._limits_are_rates, bases)
            group[LR_FACTOR] = -1.0
        if contained != 1.0:
            what = "learning rate" if is_set else "base rate"
            rate = float(group["lr"]) if is_set else bases[min(bases)]
            is_without = self._knows_schedulers
            advice = "set rates without that factor" if is_without else "a loop that sets rates names no schedulers"
            self._training.warn(
                f"the program has set the {what} of param group {index}, which has a scheduler, to {rate:.4g}. It "
                f"counts as set {'without' if is_without else 'with'} the factor {contained:.4g} of the changes of "
                f"rank, so adapters have {rate * self._missing(group):.4g}; {advice}"
            )

    def _begin(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Raise the rates of the step that begins; returns its arguments if the closure is among them."""
        self.restore()
        self._notice()
        self._change()
        return with_closure(args, kwargs, self._watched)

    def _watched(self, closure: Closure) -> Closure:
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
        self.raised = {}
        if all(self._missing(group) == 1.0 for group in groups):
            return
        self._groups = [(group["lr"], group["params"]) for group in groups]
        for number, group in enumerate([*groups]):
            own, others = self._parted(group["params"])
            if own and self._missing(group) != 1.0:
                self.raised[number] = group["lr"] * self._missing(group)
                if others:
                    group["params"] = others
                    groups.append({**group, "params": own, "lr": self.raised[number]})
                else:
                    group["lr"] = self.raised[number]

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


# {id of an optimizer: what was last hooked into it}; the hooks keep these alive as long as the optimizer.
_HOOKED: WeakValueDictionary[int, LearningRates] = WeakValueDictionary()


def mark(optimizer: Optimizer) -> None:
    """Let every param group say which factor its rate contains; a new one contains none."""
    for group in optimizer.param_groups:
        group.setdefault(LR_FACTOR, 1.0)


def mark_as_loaded(optimizer: Optimizer, groups: Sequence[SavedRate]) -> None:
    """Mark param groups that have the rates of a checkpoint, and no mark of the factors in them.

    ``groups`` has what :meth:`LearningRates.of_groups` returned. torch's distributed checkpoints load those keys of a
    group alone that it has already, so the mark of a new optimizer is lost there. An optimizer that nothing was loaded
    into has no state yet; only SGD may have none for good.
    """
    stateless = isinstance(optimizer, SGD)
    if not (optimizer.state or stateless):
        return
    for group, (rate, factor, _) in zip(optimizer.param_groups, groups, strict=False):
        is_same = float(group["lr"] or 0.0) == rate and (rate > 0 or not stateless)
        if LR_FACTOR not in group and is_same:
            group[LR_FACTOR] = factor


def begin_anew(optimizer: Optimizer) -> None:
    """Let the present rates be those of a new schedule, whatever an earlier one has multiplied into them."""
    for group in optimizer.param_groups:
        if LR_FACTOR in group:
            group[LR_FACTOR] = 1.0 if group[LR_FACTOR] > 0 else -1.0


def _contained(group: Mapping[str, Any]) -> float:
    """The factor that the group's rate contains."""
    # A group that was added after the start contains none.
    return abs(float(group.get(LR_FACTOR, 1.0)))


def _changed(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """The base rates that differ from those ``before``."""
    same = {key for key in now if key not in before or isclose(now[key], before[key], rel_tol=1e-9)}
    # No scheduler computes a rate from ``initial_lr`` alone.
    return {key: now[key] for key in now.keys() - same} if now.keys() - same != {"initial_lr"} else {}


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
