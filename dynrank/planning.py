"""What a schedule means for a model: the bounds of each layer, what must be measured, and where ranks may end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from dynrank.errors import ConfigurationError
from dynrank.layers.base import RankedLayer
from dynrank.layers.inject import lora_layers
from dynrank.resizing import layer_spectra
from dynrank.schedules import How, Stage, check_schedule
from dynrank.statistics import Needs, Window
from dynrank.targets import Budget, LayerState
from dynrank.triggers import Run


def needs_of(stage: Stage, how: How, layers: Mapping[str, RankedLayer]) -> Needs:
    """What has to be measured before ``stage`` may change ``layers``."""
    low = min((layer.rank for layer in layers.values()), default=0)
    growth = stage.to.reach(low, low)[1] - low
    return Needs(
        grams=how.metric != "weight" and (growth <= 0 or "values" in stage.needs),
        scores="scores" in stage.needs,
        new_rows=max(0, growth) if how.new_rows == "gradient" else 0,
    )


def layer_states(
    layers: Mapping[str, RankedLayer], *, last: bool, stage: Stage, metric: str, window: Window | None
) -> dict[str, LayerState]:
    """What the stage's target may know of each layer; ``last``: no stage comes after it.

    Raises:
        ConfigurationError: if a layer's factors or statistics cannot be used.
    """
    grams = window.grams if window is not None else None
    values = layer_spectra(layers, metric, grams) if "values" in stage.needs else {}
    scores = window.scores if window is not None else None
    states = {}
    for name, layer in layers.items():
        states[name] = replace(
            _bounded(layer, last), values=values.get(name), scores=scores.of(name) if scores is not None else None
        )
    return states


def _bounded(layer: RankedLayer, last: bool) -> LayerState:
    """A layer's state without measurements; its own final rank bounds every shrink and is where the last stage ends."""
    (d_out, rank), d_in = layer.lora_B.shape, layer.lora_A.shape[1]
    lowest, highest = layer.final_rank or 1, min(d_out, d_in)
    if layer.pinned:
        lowest = highest = rank
    elif layer.final_rank is not None and last:
        highest = layer.final_rank
    return LayerState(rank, d_out, d_in, lowest, highest, layer.final_rank)


def final_ranks(model: nn.Module, schedule: Sequence[Stage]) -> dict[str, tuple[int, int]]:
    """{layer: (lowest, highest) rank that it may end at}; the two are equal unless the data decide."""
    ends = {}
    for name, layer in lora_layers(model):
        low = high = layer.rank
        most = min(layer.lora_B.shape[0], layer.lora_A.shape[1])
        for number, stage in enumerate(schedule, 1):
            if layer.pinned:
                break
            low, high = (min(most, rank) for rank in stage.to.reach(low, high))
            if layer.final_rank is not None:
                low, high = max(low, layer.final_rank), max(high, layer.final_rank)
                if number == len(schedule):
                    low = high = layer.final_rank
        ends[name] = (low, high)
    return ends


def final_parameters(model: nn.Module, schedule: Sequence[Stage]) -> tuple[int, int]:
    """(fewest, most) adapter parameters that the schedule may end with."""
    layers = dict(lora_layers(model))
    ends = final_ranks(model, schedule)
    costs = {name: layer.lora_B.shape[0] + layer.lora_A.shape[1] for name, layer in layers.items()}
    low, high = (sum(costs[name] * ends[name][i] for name in layers) for i in (0, 1))
    if schedule and isinstance(schedule[-1].to, Budget) and (len(schedule) == 1 or schedule[-1].to.share is None):
        high = min(high, schedule[-1].to.pool({name: _bounded(layer, True) for name, layer in layers.items()}))
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
    ranges = check_schedule(schedule, how, highest=max(layer.rank for layer in free.values()), run=run)
    faults = []
    for number, (stage, (_, high)) in enumerate(zip(schedule, ranges, strict=True), 1):
        for name, layer in free.items():
            most = min(layer.lora_B.shape[0], layer.lora_A.shape[1])
            if high > most and high > layer.rank:
                faults.append(
                    f"stage {number}: rank {high} is above min(d_in, d_out) = {most} of {name!r}; set {stage.key}"
                )
        if isinstance(stage.to, Budget):
            faults += _budget_faults(number, stage, stage.to, layers, last=number == len(schedule))
    if faults:
        raise ConfigurationError("the schedule does not fit the model:\n  " + "\n  ".join(faults[:20]))


def _budget_faults(
    number: int, stage: Stage, budget: Budget, layers: Mapping[str, RankedLayer], *, last: bool
) -> list[str]:
    states = {name: _bounded(layer, last) for name, layer in layers.items()}
    try:
        least = budget.floor_parameters(states)
    except ConfigurationError as error:
        return [f"stage {number}: {error}; set schedule.lowest, schedule.highest or schedule.multiple"]
    given = budget.pool(states)
    if given >= least or (budget.share is not None and number > 1):  # a share of what is not known before the run
        return []
    key = "schedule.share" if budget.share is not None else "schedule.parameters"
    return [
        f"stage {number}: the budget of {given:,} parameters is below {least:,}, what the lowest ranks of "
        f"{len(layers)} layers cost; set {key} or schedule.lowest"
    ]
