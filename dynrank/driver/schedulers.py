"""torch's schedulers of learning rates, which a change multiplies: what they compute rates from, and their limits."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial, wraps
from math import inf, isclose
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    LambdaLR,
    MultiplicativeLR,
)

from dynrank.distributed.wrappers import stepping_optimizer
from dynrank.private import part_in_turn, schedulers_in

# The rates in a param group by which torch's schedulers compute the present one.
_BASES = {"initial_lr", "max_lr", "min_lr"}
# What a scheduler that waits for a better metric counts; the last two are of transformers' GreedyLR.
_COUNTS = {"num_bad_epochs", "cooldown_counter", "num_good_epochs", "warmup_counter"}


def forget_plateau(schedulers: Sequence[Any]) -> None:
    """Let schedulers that wait for a better metric, such as ReduceLROnPlateau, wait anew: ranks have fallen."""
    for scheduler in map(_inner, schedulers):
        if hasattr(scheduler, "num_bad_epochs") and hasattr(scheduler, "mode"):
            scheduler.best = inf if scheduler.mode == "min" else -inf
            for count in _COUNTS & vars(scheduler).keys():
                setattr(scheduler, count, 0)


def shown_rate(scheduler: Any, index: int) -> float | None:
    """The rate that ``scheduler`` has last set in group number ``index``; None: there was no such group."""
    shown = scheduler.get_last_lr()
    return float(shown[index]) if index < len(shown) else None


def _inner(scheduler: Any) -> Any:
    """The scheduler without accelerate's wrapper."""
    return getattr(scheduler, "scheduler", scheduler)


def with_inner(schedulers: Sequence[Any]) -> list[Any]:
    """The ``schedulers``, without accelerate's wrappers, and those inside them."""
    found: list[Any] = []
    waiting = [_inner(scheduler) for scheduler in schedulers]
    while waiting:
        scheduler = waiting.pop()
        found.append(scheduler)
        waiting += schedulers_in(scheduler)
    return found


def _waiting(schedulers: Sequence[Any]) -> set[int]:
    """Ids of the parts of SequentialLR whose turn it is not, with those inside them; they may show the present rate."""
    found: list[Any] = []
    for scheduler in schedulers:
        in_turn = part_in_turn(scheduler)
        if in_turn is not None:
            found += [part for part in schedulers_in(scheduler) if part is not in_turn]
    return {*map(id, with_inner(found))}


def of_torch(schedulers: Sequence[Any], optimizer: Optimizer) -> list[Any]:
    """The schedulers of ``optimizer``, with those inside them; none if the rates that they compute are not known here.

    So it is with a class that is not torch's. So it is if several schedulers act on a rate in the same step, and one of
    them has a limit (``eta_min``): what the others multiply then contains some of the limit.
    """
    own = [_inner(scheduler) for scheduler in schedulers]
    own = [s for s in own if stepping_optimizer(s.optimizer) is stepping_optimizer(optimizer)]
    found = with_inner(own)
    together = len(own) > 1 or any(isinstance(s, ChainedScheduler) and len(schedulers_in(s)) > 1 for s in found)
    if together and any(getattr(s, "eta_min", 0.0) for s in found):
        return []
    return found if all(type(s).__module__ == "torch.optim.lr_scheduler" for s in found) else []


def multiply(
    group: dict[str, Any],
    index: int,
    ratio: float,
    schedulers: Sequence[Any],
    limits_are_rates: bool | None,
    spared: Collection[str] = (),
) -> None:
    """Multiply the rate of ``group``, which is number ``index``, and its schedulers' base rates by ``ratio``.

    Limits that the user has given as rates stay, so the present rate is multiplied by less where it contains one. Base
    rates in ``spared``, by their keys in :func:`base_rates`, stay, too.
    """
    if ratio == 1.0:
        return
    now = float(group["lr"])
    waiting = _waiting(schedulers)
    present = [s for s in schedulers if id(s) not in waiting and shown_rate(s, index) == now]
    base = float(group.get("initial_lr", now))
    multiply_bases(group, index, ratio, schedulers, limits_are_rates, spared)
    _multiply_rate(group, index, ratio, base, present)


def _multiply_rate(group: dict[str, Any], index: int, ratio: float, base: float, present: Sequence[Any]) -> None:
    """Multiply the rate of ``group`` as its ``base`` rate was; the schedulers in ``present`` have computed it."""
    # These schedulers go from a base rate down to eta_min, and only the part above eta_min falls.
    floor = next((s.eta_min for s in present if hasattr(s, "eta_min")), 0.0)
    above = (base * ratio - floor) / (base - floor) if base != floor else ratio
    rate = floor + (float(group["lr"]) - floor) * above
    for scheduler in present:
        if has_kept_limit(scheduler, index):
            rate = float(scheduler.base_lrs[index]) * scheduler.lr_lambdas[index](scheduler.last_epoch)
    group["lr"] = _as(group["lr"], rate)
    for scheduler in present:
        # Nested schedulers may share this list.
        scheduler.get_last_lr()[index] = _as(group["lr"], rate)


def multiply_bases(
    group: dict[str, Any],
    index: int,
    ratio: float,
    schedulers: Sequence[Any],
    limits_are_rates: bool | None,
    spared: Collection[str] = (),
) -> None:
    """Multiply the :func:`base_rates` of ``group``, number ``index``, by ratio, but those whose keys are ``spared``."""
    if ratio == 1.0:
        return
    for name in _BASES & group.keys() - {*spared}:
        group[name] = group[name] * ratio
    for number, scheduler in enumerate(schedulers):
        if str(number) not in spared:
            _multiply_lists(scheduler, index, ratio)
        keep_limit(scheduler, index, ratio, limits_are_rates)


def base_rates(group: Mapping[str, Any], index: int, schedulers: Sequence[Any]) -> dict[str, float]:
    """{key: rate from which the schedulers of ``group``, number ``index``, compute its rate}.

    The key is one of the group's, or the number of a scheduler.
    """
    own = {str(number): base for number, s in enumerate(schedulers) if (base := _base(s, index)) is not None}
    return {name: float(group[name]) for name in _BASES & group.keys()} | own


def _base(scheduler: Any, index: int) -> float | None:
    """The base rate of group number ``index``; None: a group that was added later, or a scheduler of other rates."""
    bases = getattr(scheduler, "base_lrs", ())
    return float(bases[index]) if index < len(bases) else None


def follow_group(
    group: dict[str, Any],
    index: int,
    schedulers: Sequence[Any],
    contained: float | None,
    factor: float,
    limits_are_rates: bool | None,
) -> None:
    """Multiply base rates of schedulers that a resumed run has made anew, or has loaded without the optimizer.

    Args:
        group: the param group; its ``initial_lr`` contains the factor that its rate contains.
        index: number of the group.
        schedulers: its schedulers; the base rates of those that were made anew contain no factor.
        contained: the factor in the group's rate; None: the group is new, and loaded schedulers contain ``factor``.
        factor: factor of the changes so far.
        limits_are_rates: see :func:`keep_limit`.
    """
    ratio = 1.0 / factor if contained is None else contained
    if ratio == 1.0 or "initial_lr" not in group:
        return
    base = float(group["initial_lr"]) / ratio
    others = [s for s in schedulers if isclose(_base(s, index) or 0.0, base, rel_tol=1e-9)]
    # A scheduler that multiplies the rate that it finds has gone on from the loaded one, which contains the factor.
    new = [s for s in others if shown_rate(s, index) == float(group["lr"]) and _is_from_base(s, schedulers)]
    for scheduler in others:
        _multiply_lists(scheduler, index, ratio)
        if contained is not None:
            keep_limit(scheduler, index, ratio, limits_are_rates)
    if new and contained is not None:
        _multiply_rate(group, index, ratio, base, new)


def _is_from_base(scheduler: Any, schedulers: Sequence[Any]) -> bool:
    """Whether ``scheduler`` has computed its rate from its own list of base rates.

    Others multiply the rate that they find in the group, or read base rates there (OneCycleLR).
    """
    if isinstance(scheduler, LambdaLR | CyclicLR | CosineAnnealingWarmRestarts):
        return True
    # SequentialLR lets all of its parts but the first begin at their base rates.
    later = [part for of in schedulers if (part := part_in_turn(of)) is not None and part is not schedulers_in(of)[0]]
    return scheduler in later and not isinstance(scheduler, MultiplicativeLR)


def _multiply_lists(scheduler: Any, index: int, ratio: float) -> None:
    for rates in (getattr(scheduler, "base_lrs", None), getattr(scheduler, "max_lrs", None)):
        # A group that was added later has no base rate.
        if rates is not None and index < len(rates):
            rates[index] = rates[index] * ratio


def _as(present: Any, rate: float) -> Any:
    """``rate`` as a tensor if the ``present`` one is: a new tensor, because torch gives all groups the same one."""
    return torch.full_like(present, rate) if isinstance(present, Tensor) else rate


def has_kept_limit(scheduler: Any, index: int) -> bool:
    """Whether :func:`keep_limit` has replaced the function of group number ``index``."""
    return hasattr(_function(scheduler, index), "__wrapped__")


def keep_limit(scheduler: Any, index: int, ratio: float, limits_are_rates: bool | None) -> None:
    """Keep the limit of group number ``index``, whose base rate is multiplied by ``ratio``, if it is a rate.

    transformers makes functions from the limit as a share of the base rate (``min_lr_rate``; only the caller knows
    whether the user has given a rate, ``limits_are_rates``), or from both rates (``lr_end``, ``lr_init``).
    """
    made = _transformers_function(scheduler, index)
    if ratio == 1.0 or made is None:
        return
    given = made.keywords
    if "lr_end" in given:
        changed = {"lr_init": given["lr_init"] * ratio}
    elif limits_are_rates and given.get("min_lr_rate"):
        changed = {"min_lr_rate": given["min_lr_rate"] / ratio}
    else:
        return
    other = partial(made.func, *made.args, **{**given, **changed})

    # LambdaLR saves no function in a checkpoint.
    @wraps(other, assigned=())
    def limited(step: int) -> float:
        return float(other(step))

    scheduler.lr_lambdas[index] = limited


def limit_as_share(scheduler: Any, index: int) -> float | None:
    """The limit of group number ``index`` as a share of its base rate, in a schedule of transformers; None: no such."""
    made = _transformers_function(scheduler, index)
    return None if made is None else made.keywords.get("min_lr_rate") or None


def _transformers_function(scheduler: Any, index: int) -> partial[float] | None:
    """The function of group number ``index`` as transformers has made it; None if somebody else has."""
    function = _function(scheduler, index)
    made = getattr(function, "__wrapped__", function)
    # A user's own function may have arguments of the same names.
    is_theirs = isinstance(made, partial) and made.func.__module__ == "transformers.optimization"
    return made if is_theirs else None


def _function(scheduler: Any, index: int) -> Any:
    """The function of group number ``index``; None if the scheduler has none."""
    functions = getattr(scheduler, "lr_lambdas", ())
    return functions[index] if index < len(functions) else None
