"""One budget of parameters shared among layers: the ranks that keep most, exactly.

A layer of rank k keeps the first k of its gains (squared singular values, largest first) and costs k * (d_out + d_in)
parameters. Going from one admissible rank to the next is a step; the gain per parameter falls from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import fsum, isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from dynrank.errors import ConfigurationError

__all__ = ["allocate"]

_CHUNK = 2**21  # combinations looked at together, to bound the memory
_ROUNDING = 1e-12


def allocate(
    gains: Sequence[Sequence[float] | Tensor], costs: Sequence[int], choices: Sequence[Sequence[int]], budget: int
) -> list[int]:
    """Ranks k_i of ``choices[i]`` with the largest ``sum_i sum_{j < k_i} gains[i][j]`` that cost at most ``budget``.

    The optimum, not the greedy answer, which unequal costs make wrong: the greedy answer and the linear relaxation
    bound how much any better one can deviate from it, and all that remains is searched by dynamic programming over
    the undominated (cost, gain) pairs (the core idea of Pisinger, A minimal algorithm for the multiple-choice knapsack
    problem, 1995). Of equal sums (to rounding) the cheaper is taken.

    Args:
        gains: for each layer what each further direction brings, non-increasing, >= 0; missing entries count 0.
        costs: for each layer the parameters of one direction, d_out + d_in.
        choices: for each layer its admissible ranks.
        budget: parameters of all layers together.

    Returns:
        One rank for each layer.

    Raises:
        ConfigurationError: if the lowest choices cost more than the budget, a layer has no choice, or gains are
            not as said.

    >>> allocate([[9.0, 1.0], [4.0, 3.0]], costs=[10, 10], choices=[range(1, 3)] * 2, budget=30)
    [1, 2]
    """
    ladders = [sorted(set(ranks)) for ranks in choices]
    rows = [_checked(index, row) for index, row in enumerate(gains)]
    if not len(rows) == len(costs) == len(ladders) or not all(ladders):
        raise ConfigurationError(
            f"every layer needs gains, a cost and choices, got {len(rows)}, {len(costs)} and {[*map(len, ladders)]}"
        )
    if any(cost < 1 for cost in costs):
        raise ConfigurationError(f"costs must be at least 1, got {min(costs)}")
    least = sum(cost * ladder[0] for cost, ladder in zip(costs, ladders, strict=True))
    if least > budget:
        raise ConfigurationError(f"budget must be at least {least:,}, the cost of the lowest ranks, got {budget:,}")
    pools = _pools(rows, costs, ladders)
    steps = [0] * len(ladders)
    for pool, taken in zip(pools, _best_counts(pools, budget - least), strict=True):
        for layer in pool.layers[:taken]:
            steps[layer] += 1
    return [ladder[step] for ladder, step in zip(ladders, steps, strict=True)]


def _checked(index: int, row: Sequence[float] | Tensor) -> list[float]:
    values = [float(value) for value in (row.tolist() if isinstance(row, Tensor) else row)]
    if not all(isfinite(value) and value >= 0 for value in values) or any(a < b for a, b in pairwise(values)):
        raise ConfigurationError(
            f"gains must be finite, >= 0 and non-increasing, got {values!r:.200} for layer {index}"
        )
    return values


@dataclass(frozen=True)
class _Pool:
    """Steps in the only order worth taking them: of one layer, or of all layers whose steps cost the same.

    Attributes:
        layers: for each step the layer that it raises.
        cost: (S + 1,) float64 (whole numbers below 2^53 are exact), of the first n steps together.
        gain: (S,) float64, of each step by itself, above 0; per parameter it never rises.
    """

    layers: list[int]
    cost: Tensor
    gain: Tensor


def _pools(gains: Sequence[list[float]], costs: Sequence[int], ladders: Sequence[list[int]]) -> list[_Pool]:
    # Where every step costs the same, the best n steps are the n of largest gain: such layers are one, however many.
    members: dict[tuple[int, ...], list[tuple[float, int, int]]] = {}
    for layer, (row, cost, ladder) in enumerate(zip(gains, costs, ladders, strict=True)):
        sizes = [cost * (above - below) for below, above in pairwise(ladder)]
        key = (sizes[0],) if len(set(sizes)) == 1 else (-1, layer)
        for size, (below, above) in zip(sizes, pairwise(ladder), strict=True):
            gain = fsum(row[below:above])
            if gain > 0:  # a step that brings nothing is never taken
                members.setdefault(key, []).append((gain, size, layer))
    pools = []
    for steps in members.values():
        steps.sort(key=lambda step: -step[0] / step[1])
        table = torch.tensor([(gain, size) for gain, size, _ in steps], dtype=torch.float64)
        total = torch.cat([table.new_zeros(1), table[:, 1].cumsum(0)])
        pools.append(_Pool([layer for *_, layer in steps], total, table[:, 0]))
    return pools


class _States(NamedTuple):
    """Ways to spend on the pools seen so far: their cost and loss, and how each came to be."""

    cost: Tensor
    loss: Tensor
    parent: Tensor
    taken: Tensor


def _best_counts(pools: Sequence[_Pool], room: int) -> list[int]:
    """How many steps of each pool to take for the largest gain at a cost of at most ``room``."""
    price, start = _relaxed(pools, room)
    if price == 0:
        return start
    # At a price per parameter, `start` is the best count of each pool, and a count's loss is how far it stays behind.
    # A solution misses the bound of the relaxation by the losses plus the price of what it leaves unspent: only counts
    # whose loss alone is within the best known such gap can be part of a better one.
    losses = [_losses(pool, count, price) for pool, count in zip(pools, start, strict=True)]
    rest = sum(int(pool.cost[count]) for pool, count in zip(pools, start, strict=True))
    gap = price * (room - rest)
    slack = _ROUNDING * (gap + price * max(int(pool.cost.diff().max()) for pool in pools))
    order = sorted(range(len(pools)), key=lambda index: int((losses[index] <= gap + slack).sum()))
    spans = [pool.cost[loss <= gap + slack] for pool, loss in zip(pools, losses, strict=True)]
    lightest, heaviest = sum(int(span[0]) for span in spans), sum(int(span[-1]) for span in spans)

    nothing, origin = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    stages = [_States(nothing, nothing, origin, origin)]
    for index in order[:-1]:
        pool, loss, states = pools[index], losses[index], stages[-1]
        lightest, heaviest = lightest - int(spans[index][0]), heaviest - int(spans[index][-1])
        rest -= int(pool.cost[start[index]])
        parts = []
        window = torch.nonzero(loss <= gap + slack).flatten()
        for counts in torch.split(window, max(1, _CHUNK // len(states.cost))):
            cost = (states.cost[:, None] + pool.cost[counts]).flatten()
            lost = (states.loss[:, None] + loss[counts]).flatten()
            unspent = (room - heaviest - cost).clamp(min=0)
            alive = torch.nonzero((cost <= room - lightest) & (lost + price * unspent <= gap + slack)).flatten()
            came = _States(cost[alive], lost[alive], alive // len(counts), counts[alive % len(counts)])
            parts.append(_undominated(came, price))
        states = _undominated(_States(*(torch.cat(field) for field in zip(*parts, strict=True))), price)
        stages.append(states)
        fits = states.cost + rest <= room  # with the remaining pools at their start
        if fits.any():
            gap = min(gap, float((states.loss + price * (room - rest - states.cost))[fits].min()))

    pool, loss, states = pools[order[-1]], losses[order[-1]], stages[-1]
    last = torch.searchsorted(pool.cost, room - states.cost, right=True) - 1  # all that still fits
    cost = states.cost + pool.cost[last]
    missed = states.loss + loss[last] + price * (room - cost)
    best = int(torch.where(missed <= missed.min() + slack, cost, room + 1).argmin())
    counts_of = {order[-1]: int(last[best])}
    for index, stage in zip(reversed(order[:-1]), reversed(stages), strict=False):
        counts_of[index], best = int(stage.taken[best]), int(stage.parent[best])
    return [counts_of[index] for index in range(len(pools))]


def _relaxed(pools: Sequence[_Pool], room: int) -> tuple[float, list[int]]:
    """(gain per parameter at which the room is spent, steps of each pool above it); price 0 if everything fits."""
    sizes = [pool.cost.diff() for pool in pools]
    if sum(int(size.sum()) for size in sizes) <= room:
        return 0.0, [len(pool.layers) for pool in pools]
    size = torch.cat(sizes)
    worth = torch.cat([pool.gain / step for pool, step in zip(pools, sizes, strict=True)])
    owner = torch.repeat_interleave(torch.tensor([len(step) for step in sizes]))
    order = torch.argsort(worth, descending=True, stable=True)
    taken = int((size[order].cumsum(0) <= room).sum())
    return float(worth[order[taken]]), torch.bincount(owner[order[:taken]], minlength=len(pools)).tolist()


def _losses(pool: _Pool, start: int, price: float) -> Tensor:
    """(S + 1,): what each count forgoes against ``start`` when a parameter costs ``price``; 0 at ``start``."""
    net = (pool.gain - price * pool.cost.diff()).abs()  # gained per step up to `start`, lost per step after it
    down = net[:start].flip(0).cumsum(0).flip(0)
    return torch.cat([down, torch.zeros(1, dtype=torch.float64), net[start:].cumsum(0)])


def _undominated(states: _States, price: float) -> _States:
    """The states, by cost, without those that cost no less than another and gain no more."""
    order = torch.argsort(states.loss, stable=True)
    order = order[torch.argsort(states.cost[order], stable=True)]
    gain = price * states.cost[order] - states.loss[order]
    if gain.numel() == 0:
        return states
    before = torch.cat([gain.new_full((1,), -torch.inf), gain.cummax(0).values[:-1]])
    return _States(*(field[order][gain > before] for field in states))
