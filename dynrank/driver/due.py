"""What the target of a stage is told of the layers: when the stage is due, and as expected before the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dynrank.change.resize import Change, LayerDirections, LayerReport
from dynrank.driver.importance import LayerImportance
from dynrank.driver.event import RankEvent
from dynrank.driver.training import Training
from dynrank.layers.base import RankedLayer, max_rank
from dynrank.schedules import Stage
from dynrank.targets import LayerState


@dataclass(frozen=True)
class DueStage:
    """A stage whose change is due, with the layers that it may change.

    Attributes:
        stage: the stage.
        last: whether it is the last one of the schedule.
        reason: why it is due.
        layers: {name: layer} of the model.
        directions: the directions of the layers that are not pinned.
        importance: what each layer has brought; empty if unknown.
    """

    stage: Stage
    last: bool
    reason: str
    layers: Mapping[str, RankedLayer]
    directions: LayerDirections
    importance: Mapping[str, LayerImportance]

    def states(self) -> dict[str, LayerState]:
        """The state of each layer that the stage's target reads."""
        needs = self.stage.to.needs
        worth = {name: share.worth for name, share in self.importance.items()} if "importance" in needs else {}
        values = self.directions.values() if "values" in needs else {}
        states = {}
        for name, layer in self.layers.items():
            # A pinned layer keeps its rank, so no target reads its values.
            nothing = torch.zeros(layer.rank, dtype=torch.float64) if "values" in needs else None
            state = _state(layer, layer.rank, self.last, values.get(name, nothing), worth.get(name))
            # A frozen layer has brought nothing, and a pool would cut off what it learned earlier.
            trains = layer.lora_A.requires_grad or layer.lora_B.requires_grad
            states[name] = state if trains else replace(state, lowest=layer.rank, highest=layer.rank)
        return states

    def change(self, training: Training) -> Change:
        """The change to the ranks of the stage's target, which is not yet made."""
        return training.compute(lambda: self.stage.to.ranks(self.states()), self.directions, self.stage.how)

    def event(self, step: int, reports: Sequence[LayerReport], reason: str, *, undone: bool = False) -> RankEvent:
        """The event of a change, with what each of its layers has brought, where that is known."""
        layers = []
        for report in reports:
            share = self.importance.get(report.layer)
            layers.append(report if share is None else replace(report, importance=share.value, importance_error=share.error))
        return RankEvent(step, reason, tuple(layers), undone)


def expected_states(
    layers: Mapping[str, RankedLayer], ranks: Mapping[str, int], *, last: bool
) -> dict[str, LayerState]:
    """The states at these ranks if all layers' values fall alike: 1, 1/2, 1/3, ..."""
    falling = {name: 1 / torch.arange(1, rank + 1, dtype=torch.float64) for name, rank in ranks.items()}
    return {name: _state(layer, ranks[name], last, falling[name]) for name, layer in layers.items()}


def _state(
    layer: RankedLayer, rank: int, last: bool, values: Tensor | None, importance: float | None = None
) -> LayerState:
    """No stage shrinks a layer below its own final rank, and the ``last`` stage brings it to that rank."""
    lowest = layer.final_rank or 1
    highest = max_rank(layer)
    if layer.pinned:
        lowest = highest = rank
    elif layer.final_rank is not None and last:
        highest = layer.final_rank
    d_out = len(layer.lora_B)
    d_in = layer.lora_A[0].numel()
    own: dict[str, Any] = {"final_rank": layer.final_rank, "cap": layer.highest, "num_products": layer.num_products}
    return LayerState(rank, d_out, d_in, lowest, highest, values=values, importance=brought, **own)
