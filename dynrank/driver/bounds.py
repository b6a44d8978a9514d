"""What a schedule means for a model: the bounds of each layer, where ranks may end, and what does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from dynrank.change.measuring import Window
from dynrank.change.predict import spectra
from dynrank.errors import ConfigurationError
from dynrank.layers.finding import lora_layers
from dynrank.layers.ranked import RankedLayer, max_rank
from dynrank.schedules import How, Stage, check_schedule
from dynrank.targets import UNBOUNDED, Budget, LayerState
from dynrank.triggers import Run


def layer_states(
    layers: Mapping[str, RankedLayer], *, last: bool, stage: Stage, how: How, window: Window | None
) -> dict[str, LayerState]:
    """What the stage's target may know of each layer; ``last``: no stage comes after it.

    Raises:
        ConfigurationError: if a layer's factors or statistics cannot be used.
    """
    free = {name: layer for name, layer in layers.items() if not layer.pinned}
    values = spectra(free, how, window) if "values" in stage.to.needs else {}
    scores = window.scores if window is not None else None
    states = {}
    for name, layer in layers.items():
        nothing = torch.zeros(layer.rank, dtype=torch.float64)  # nobody asks what a pinned layer's directions are worth
        states[name] = replace(
            bounded(layer, last),
            values=values.get(name, nothing) if "values" in stage.to.needs else None,
            scores=(scores.of(name) if name in free else nothing) if scores is not None else None,
        )
    return states


def bounded(layer: RankedLayer, last: bool) -> LayerState:
    """A layer's state without measurements; its own final rank bounds every shrink and is where the last stage ends."""
    (d_out, rank), d_in = layer.lora_B.shape, layer.lora_A.shape[1]
    lowest, highest = layer.final_rank or 1, max_rank(layer)[0]
    if layer.pinned:
        lowest = highest = rank
    elif layer.final_rank is not None and last:
        highest = layer.final_rank
    return LayerState(rank, d_out, d_in, lowest, highest, layer.final_rank)


def final_ranks(model: nn.Module, schedule: Sequence[Stage]) -> dict[str, tuple[int, int]]:
    """{layer: (lowest, highest) rank that it may end at}; the two are equal unless the data decide."""
    ends = {}
    for name, layer in lora_layers(model):
        low, high, _ = [(layer.rank, layer.rank, 0), *_path(layer, schedule)][-1]
        ends[name] = (low, high)
    return ends


def _path(layer: RankedLayer, schedule: Sequence[Stage]) -> list[tuple[int, int, int]]:
    """(lowest, highest rank after it, lowest that it asks for whatever the layer's shape) of each stage."""
    low = high = layer.rank
    path = []
    for number, stage in enumerate(schedule, 1):
        bounds = bounded(layer, last=number == len(schedule))
        from_low, from_high = (bounds if layer.pinned else replace(bounds, rank=rank) for rank in (low, high))
        wanted, _ = stage.reach(replace(from_high, highest=UNBOUNDED))
        low, high = stage.reach(from_low)[0], stage.reach(from_high)[1]
        path.append((low, high, wanted))
    return path


def final_parameters(model: nn.Module, schedule: Sequence[Stage]) -> tuple[int, int]:
    """(fewest, most) adapter parameters that the schedule may end with."""
    layers = dict(lora_layers(model))
    ends = final_ranks(model, schedule)
    costs = {name: layer.lora_B.shape[0] + layer.lora_A.shape[1] for name, layer in layers.items()}
    low, high = (sum(costs[name] * ends[name][i] for name in layers) for i in (0, 1))
    if schedule and isinstance(schedule[-1].to, Budget) and (len(schedule) == 1 or schedule[-1].to.share is None):
        high = min(high, schedule[-1].to.pool({name: bounded(layer, True) for name, layer in layers.items()}))
    return low, high


def check_model(model: nn.Module, schedule: Sequence[Stage], how: How, run: Run) -> None:
    """Refuse a model that the schedule cannot be carried out on; weights are not looked at.

    Raises:
        ConfigurationError: if there are no LoRA layers, or naming each stage, key and layer that does not fit.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise ConfigurationError(
            "RankScheduler needs a model with LoRA layers; call dynrank.add_lora on it (lora.target_modules)"
        )
    free = {name: layer for name, layer in layers.items() if not layer.pinned and layer.final_rank is None}
    if not free:
        return
    check_schedule(schedule, highest=max(layer.rank for layer in free.values()), run=run)
    paths = {name: [(layer.rank, layer.rank, layer.rank), *_path(layer, schedule)] for name, layer in layers.items()}
    faults = []
    for number, stage in enumerate(schedule, 1):
        last = number == len(schedule)
        for name, layer in free.items():
            most, why = max_rank(layer)
            wanted = paths[name][number][2]
            if wanted > most:
                faults.append(f"stage {number}: rank {wanted} is above {why} = {most} of {name!r}; set {stage.key}")
        before = {name: path[number - 1] for name, path in paths.items()}
        if (stage.how or how).new_rows == "gradient":
            faults += [
                f"stage {number}: {name!r} adapts a {type(layer.base).__name__}, and growing along the gradient is for "
                "linear layers; set schedule.new_rows=orthogonal"
                for name, layer in layers.items()
                if isinstance(layer.base, nn.Embedding | nn.Conv2d) and paths[name][number][1] > before[name][0]
            ]
        if isinstance(stage.to, Budget):
            states = {name: replace(bounded(layer, last), rank=before[name][0]) for name, layer in layers.items()}
            known = all(low == high for low, high, _ in before.values())
            faults += _budget_faults(number, stage.to, states, known=known)
    if faults:
        raise ConfigurationError("the schedule does not fit the model:\n  " + "\n  ".join(faults[:20]))


def _budget_faults(number: int, budget: Budget, states: Mapping[str, LayerState], *, known: bool) -> list[str]:
    """What is wrong with a budget for layers of these ranks or, unless they are ``known``, of higher ones."""
    if budget.share is not None and not known:
        return []
    given, least = budget.pool(states), budget.floor_parameters(states)
    if given >= least:
        return []
    key = "schedule.share" if budget.share is not None else "schedule.parameters"
    return [
        f"stage {number}: the budget of {given:,} parameters is below {least:,}, what the lowest ranks of "
        f"{len(states)} layers cost; set {key} or schedule.lowest"
    ]
