"""A stage that is due, and the states of the layers that its target reads: at present, or as expected before a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dynrank.change.change import Change
from dynrank.change.directions import LayerDirections
from dynrank.change.reports import LayerReport
from dynrank.driver.event import Measured, RankEvent
from dynrank.driver.learning_rates import factor_of_change
from dynrank.driver.training import Training
from dynrank.errors import ConfigurationError, shown
from dynrank.importance.importance import LayerImportance
from dynrank.layers.finding import lora_layers
from dynrank.layers.ranked_layer import RankedLayer
from dynrank.rank_map import FREE, RankBounds
from dynrank.schedules import Stage
from dynrank.targets import LayerState


@dataclass(frozen=True)
class DueStage:
    """A stage whose change is due, with the layers of the model.

    Attributes:
        stage: the stage.
        last: whether it is the last one of the schedule.
        reason: why it is due.
        layers: {name: layer} of the model.
        bounds: what the rank of each layer may become.
        directions: the directions of the layers that are not pinned.
        importance: the importance of each layer; empty if unknown.
    """

    stage: Stage
    last: bool
    reason: str
    layers: Mapping[str, RankedLayer]
    bounds: Mapping[str, RankBounds]
    directions: LayerDirections
    importance: Mapping[str, LayerImportance]

    @classmethod
    def now(
        cls,
        training: Training,
        stage: Stage,
        reason: str,
        bounds: Mapping[str, RankBounds],
        importance: Mapping[str, LayerImportance],
        *,
        last: bool,
    ) -> DueStage:
        """``stage`` with the present layers of ``training``."""
        layers = dict(lora_layers(training.model))
        # Only of the layers that may change: a pinned one is not decomposed, and its factors may even be not finite.
        directions = LayerDirections({name: layer for name, layer in layers.items() if not bounds[name].pinned})
        return cls(stage, last, reason, layers, bounds, directions, importance)

    def states(self) -> dict[str, LayerState]:
        """The state of each layer that the stage's target reads."""
        needs = self.stage.to.needs
        scores = {name: each.score for name, each in self.importance.items()} if "importance" in needs else {}
        values = self.directions.values() if "values" in needs else {}
        states = {}
        for name, layer in self.layers.items():
            # A pinned layer keeps its rank, so no target reads its values.
            nothing = torch.zeros(layer.rank, dtype=torch.float64) if "values" in needs else None
            states[name] = _state(
                layer, self.bounds[name], layer.rank, self.last, values.get(name, nothing), scores.get(name)
            )
        return states

    def ranks(self) -> dict[str, int]:
        """The ranks that the stage's target gives for the present state of the layers."""
        return ranks_of_target(self.stage, self.bounds, self.states())

    def change(self, training: Training, plan: Callable[[], Mapping[str, int]]) -> Change:
        """The change to the ranks that ``plan`` returns, which is not yet made; a collective call."""
        return Change.in_run(training.adapters, plan, self.directions, self.stage.how.optimizer_state, training.step)

    def event(
        self,
        step: int,
        reports: Sequence[LayerReport],
        reason: str,
        measured: Measured | None = None,
        *,
        undone: bool = False,
    ) -> RankEvent:
        """The event of a change, with the importance of each of its layers, where that is known."""
        layers = []
        for report in reports:
            known = self.importance.get(report.layer)
            if known is not None:
                report = replace(report, importance=known.value, importance_error=known.error)
            layers.append(report)
        others = {name: layer.rank for name, layer in self.layers.items()}
        before = others | {report.layer: report.rank_before for report in reports}
        after = others | {report.layer: report.rank_after for report in reports}
        factor = 1.0 if undone else factor_of_change(self.stage.how, before, after)
        return RankEvent(step, reason, tuple(layers), undone, measured, factor)

    def warn_of_unknown(self, training: Training, unmeasured: Sequence[str]) -> None:
        """Warn if there is no importance of some of the layers that share ranks by it, or of any."""
        free = {name for name, layer in self.layers.items() if not keeps_rank(layer, self.bounds[name])}
        unknown = [name for name in unmeasured if name in free]
        if unknown and len(unknown) == len(free):
            training.warn(
                f"the change of rank at step {training.step} shares ranks by importance, and nothing is known of any "
                "layer, so all layers count alike: no gradients of the adapters were there when a step ended"
            )
        elif unknown:
            training.warn(
                f"{unknown[0]!r} and {len(unknown) - 1} other layers had no gradients before the change of rank at "
                f"step {training.step}, so they count as unimportant. If a module reads their weights without calling "
                "them, their LoRA does nothing: leave them out of target_modules"
            )


def ranks_of_target(stage: Stage, bounds: Mapping[str, RankBounds], states: Mapping[str, LayerState]) -> dict[str, int]:
    """The ranks that the target of ``stage`` gives; one of a user's that breaks the bounds of a layer is refused."""
    ranks = stage.to.ranks(states)
    for name, own in bounds.items():
        state = states[name]
        if name not in ranks:
            raise ConfigurationError(
                f"{shown(stage.to)} gives no rank to the layer {name!r}; let its ranks() return one for every layer, "
                "layer.rank for those that stay",
                *stage.arguments,
            )
        is_free = own == FREE and state.lowest < state.highest
        # A shrinking target leaves a layer below its bounds as it is, a growing one a layer above them.
        if is_free or ranks[name] == state.rank or state.lowest <= ranks[name] <= state.highest:
            continue
        raise ConfigurationError(
            f"{shown(stage.to)} gives rank {ranks[name]} to the layer {name!r}, whose lowest rank is {state.lowest} "
            f"and highest {state.highest}, by rank_map or because it is frozen; let its ranks() return "
            "layer.shrunk(rank) or layer.grown(rank), which keep that",
            *stage.arguments,
        )
    return ranks


def expected_states(
    layers: Mapping[str, RankedLayer],
    bounds: Mapping[str, RankBounds],
    ranks: Mapping[str, int],
    *,
    last: bool,
) -> dict[str, LayerState]:
    """The states at these ranks if the values of all layers are 1, 1/2, 1/3, ..."""
    falling = {name: 1 / torch.arange(1, rank + 1, dtype=torch.float64) for name, rank in ranks.items()}
    return {name: _state(layer, bounds[name], ranks[name], last, falling[name]) for name, layer in layers.items()}


def keeps_rank(layer: RankedLayer, bounds: RankBounds) -> bool:
    """Whether schedules keep the layer's rank: it is pinned, or frozen (then a cut may still balance it).

    A frozen layer has no importance, and a pool would cut off what it learned earlier.
    """
    return bounds.pinned or is_frozen(layer)


def is_frozen(layer: RankedLayer) -> bool:
    return not (layer.lora_A.requires_grad or layer.lora_B.requires_grad)


def _state(
    layer: RankedLayer,
    bounds: RankBounds,
    rank: int,
    last: bool,
    values: Tensor | None,
    importance: float | None = None,
) -> LayerState:
    """A layer that keeps its rank has it as both bounds.

    No stage shrinks another one below its own final rank, and the ``last`` stage brings it to that rank.
    """
    lowest = bounds.final_rank or bounds.lowest or 1
    highest = min(layer.max_rank, bounds.highest or layer.max_rank)
    if keeps_rank(layer, bounds):
        lowest = highest = rank
    elif bounds.final_rank is not None and last:
        highest = bounds.final_rank
    own: dict[str, Any] = {"final_rank": bounds.final_rank, "num_products": layer.num_products}
    return LayerState(rank, layer.d_out, layer.d_in, lowest, highest, values=values, importance=importance, **own)
