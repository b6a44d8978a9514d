"""The bounds that each layer sets for a schedule's targets, and the bounds of the final ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from dynrank.change.choice import Choice
from dynrank.layers.base import RankedLayer, max_rank
from dynrank.layers.finding import lora_layers
from dynrank.schedules import Stage
from dynrank.targets import UNBOUNDED, Budget, LayerState, Target


def bounded(layer: RankedLayer, last: bool) -> LayerState:
    """A layer's state without measurements.

    No stage shrinks the layer below its own final rank, and the ``last`` stage brings it to that rank.
    """
    rank, d_out, d_in = layer.rank, len(layer.lora_B), layer.lora_A[0].numel()
    lowest, highest = layer.final_rank or 1, max_rank(layer)
    if layer.pinned:
        lowest = highest = rank
    elif layer.final_rank is not None and last:
        highest = layer.final_rank
    return LayerState(
        rank, d_out, d_in, lowest, highest, layer.final_rank, cap=layer.highest, experts=layer.num_products
    )


def layer_states(
    layers: Mapping[str, RankedLayer], *, last: bool, target: Target, choice: Choice
) -> dict[str, LayerState]:
    """The state of each layer that ``target`` reads; ``last``: whether the target's stage is the last."""
    states = {name: bounded(layer, last) for name, layer in layers.items()}
    if "values" in target.needs:
        values = choice.values()
        for name, state in states.items():
            # A pinned layer keeps its rank, so no target reads its values.
            nothing = torch.zeros(state.rank, dtype=torch.float64)
            states[name] = replace(state, values=values.get(name, nothing))
    return states


def path(layer: RankedLayer, schedule: Sequence[Stage]) -> list[tuple[int, int, int]]:
    """For each stage: (lowest rank after it, highest rank after it, lowest rank it asks for if no shape bounds it).

    The first entry is the rank before the first stage.
    """
    low = high = layer.rank
    ranges = [(low, high, high)]
    for number, stage in enumerate(schedule, 1):
        bounds = bounded(layer, last=number == len(schedule))
        from_low, from_high = (bounds if layer.pinned else replace(bounds, rank=rank) for rank in (low, high))
        wanted, _ = stage.to.reach(replace(from_high, highest=UNBOUNDED))
        low, high = stage.to.reach(from_low)[0], stage.to.reach(from_high)[1]
        ranges.append((low, high, wanted))
    return ranges


def final_ranks(model: nn.Module, schedule: Sequence[Stage]) -> dict[str, tuple[int, int]]:
    """{layer: (lowest, highest) possible final rank}; the two are equal unless the final rank depends on the data."""
    return {name: path(layer, schedule)[-1][:2] for name, layer in lora_layers(model)}


def final_parameters(model: nn.Module, schedule: Sequence[Stage]) -> tuple[int, int]:
    """(fewest, most) adapter parameters that the schedule may end with."""
    states, ends = {name: bounded(layer, True) for name, layer in lora_layers(model)}, final_ranks(model, schedule)
    low, high = (sum(state.cost * ends[name][i] for name, state in states.items()) for i in (0, 1))
    target = schedule[-1].to if schedule else None
    if isinstance(target, Budget) and (len(schedule) == 1 or not target.is_relative):
        high = min(high, target.pool(states))
    return low, high
