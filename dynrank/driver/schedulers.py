"""torch's schedulers of learning rates, which a change multiplies: what they compute rates from, and their limits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, wraps
from math import inf
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from dynrank.distributed.wrappers import stepping_optimizer
from dynrank.private import schedulers_in

# The rates in a param group by which torch's schedulers compute the present one.
_BASES = ("initial_lr", "max_lr", "min_lr")


def forget_plateau(schedulers: Sequence[Any]) -> None:
    """Let schedulers that wait for a better metric, such as ReduceLROnPlateau, wait anew: ranks have fallen."""
    for scheduler in map(_inner, schedulers):
        if hasattr(scheduler, "num_bad_epochs"):
            scheduler.best = inf if scheduler.mode == "min" else -inf
            scheduler.num_bad_epochs = 0


def shown_rate(scheduler: Any, index: int) -> float | None:
    """The rate that ``scheduler`` has last set in group number ``index``; None: there was no such group."""
    shown = scheduler.get_last_lr()
    return float(shown[index]) if index < len(shown) else None


def _inner(scheduler: Any) -> Any:
    """The scheduler without accelerate's wrapper."""
    return getattr(scheduler, "scheduler", scheduler)


def of_torch(schedulers: Sequence[Any], optimizer: Optimizer) -> list[Any] | None:
    """The schedulers of ``optimizer``, with those inside them; None if one is not a class of torch's, or not given.

    Another class may compute rates from values that are not known here.
    """
    found: list[Any] = []
    waiting = [*map(_inner, schedulers)]
    while waiting:
        scheduler = waiting.pop()
        if stepping_optimizer(scheduler.optimizer) is stepping_optimizer(optimizer):
            found.append(scheduler)
            waiting += schedulers_in(scheduler)
    # torch's schedulers leave this key in the groups, also those that a module keeps to itself.
    is_missing = not found and any("initial_lr" in group for group in optimizer.param_groups)
    return found if not is_missing and all(type(s).__module__ == "torch.optim.lr_scheduler" for s in found) else None


def multiply(
    group: dict[str, Any], index: int, ratio: float, schedulers: Sequence[Any], limited: Sequence[Any]
) -> None:
    """Multiply the rate of ``group``, which is number ``index``, and its schedulers' base rates by ``ratio``.

    ``limited``: those that have a limit as a share of the base rate; it stays.
    """
    if ratio == 1.0:
        return
    now = float(group["lr"])
    # These schedulers go from a base rate down to eta_min, and only the part above eta_min falls.
    floors = [s.eta_min for s in schedulers if hasattr(s, "eta_min") and float(s.get_last_lr()[index]) == now]
    floor = (floors or [0.0])[0]
    base = float(group.get("initial_lr", now))
    above = (base * ratio - floor) / (base - floor) if base != floor else ratio
    _set(group, "lr", floor + (now - floor) * above)
    multiply_bases(group, index, ratio, schedulers, limited)
    for scheduler in limited:
        if limited_function(scheduler, index) is not None and shown_rate(scheduler, index) == now:
            _set(group, "lr", scheduler.base_lrs[index] * scheduler.lr_lambdas[index](scheduler.last_epoch))
    for scheduler in schedulers:
        # Nested schedulers may share this list.
        shown = scheduler.get_last_lr()
        if index < len(shown) and float(shown[index]) == now:
            shown[index] = group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"]


def _set(group: dict[str, Any], name: str, rate: Any) -> None:
    if isinstance(group[name], Tensor):
        # Captured steps of an optimizer read this tensor.
        group[name].fill_(rate)
    else:
        group[name] = rate


def multiply_bases(
    group: dict[str, Any], index: int, ratio: float, schedulers: Sequence[Any], limited: Sequence[Any]
) -> None:
    """Multiply the rates by ``ratio`` from which the schedulers of ``group``, number ``index``, compute its rate."""
    if ratio == 1.0:
        return
    for name in _BASES:
        if name in group:
            _set(group, name, group[name] * ratio)
    for scheduler in schedulers:
        for rates in (getattr(scheduler, "base_lrs", None), getattr(scheduler, "max_lrs", None)):
            # A group that was added later has no base rate.
            if rates is not None and index < len(rates):
                rates[index] = rates[index] * ratio
    for scheduler in limited:
        keep_limit(scheduler, index, ratio)


def limited_function(scheduler: Any, index: int) -> Any:
    """The function of group number ``index`` that has a limit as a share of the base rate; None: there is none.

    It is a partial, as transformers makes it, or ours with another share.
    """
    functions = getattr(scheduler, "lr_lambdas", ())
    function = functions[index] if index < len(functions) else None
    made = getattr(function, "__wrapped__", function)
    return function if isinstance(made, partial) and made.keywords.get("min_lr_rate") else None


def keep_limit(scheduler: Any, index: int, ratio: float) -> None:
    """Keep the limit of group number ``index``, whose base rate is multiplied by ``ratio``."""
    function = limited_function(scheduler, index)
    if function is None or ratio == 1.0:
        return
    made = getattr(function, "__wrapped__", function)
    share = made.keywords["min_lr_rate"] / ratio
    other = partial(made.func, *made.args, **{**made.keywords, "min_lr_rate": share})

    # LambdaLR saves no function in a checkpoint.
    @wraps(other, assigned=())
    def limited(step: int) -> float:
        return float(other(step))

    scheduler.lr_lambdas[index] = limited
