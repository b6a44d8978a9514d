"""The layers of a model, and what the rank of each may become: by the schedule's rank map, or by its own rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynrank.errors import ConfigurationError, described, shown
from dynrank.layers.finding import lora_layers
from dynrank.layers.ranked_layer import RankedLayer
from dynrank.patterns import rule_of_each
from dynrank.rank_map import FREE, RankBounds
from dynrank.schedules import Stage
from dynrank.targets import LayerState


@dataclass(frozen=True)
class BoundLayers:
    """Layers, and the bounds of their ranks.

    Attributes:
        layers: {name: layer} of the model.
        bounds: {name: what its rank may become}.
    """

    layers: Mapping[str, RankedLayer]
    bounds: Mapping[str, RankBounds]

    @classmethod
    def of(cls, model: nn.Module, rules: Mapping[str, RankBounds]) -> BoundLayers:
        """The layers of ``model``.

        The first of ``rules`` that matches a layer decides; for a layer that none matches, its own rule, which
        :func:`dynrank.add_lora` gave it.

        Raises:
            ConfigurationError: if a rule matches no layer, or only layers of earlier rules.
        """
        layers = dict(lora_layers(model))
        keys, faults = rule_of_each(rules, layers)
        if faults:
            raise ConfigurationError("rank_map does not fit the model:\n  " + "\n  ".join(faults), "rank_map")
        return cls(layers, {n: rules[keys[n]] if n in keys else layer.bounds for n, layer in layers.items()})

    @property
    def ranks(self) -> dict[str, int]:
        """{name: its rank now}."""
        return {name: layer.rank for name, layer in self.layers.items()}

    def keeps_rank(self, name: str) -> bool:
        """Whether schedules keep the layer's rank: it is pinned, or frozen (then a cut may still balance it).

        A frozen layer has no importance, and a pool would cut off what it learned earlier.
        """
        return self.bounds[name].pinned or self._is_frozen(name)

    def _is_frozen(self, name: str) -> bool:
        layer = self.layers[name]
        return not (layer.lora_A.requires_grad or layer.lora_B.requires_grad)

    def state(
        self, name: str, rank: int, *, last: bool, values: Tensor | None = None, importance: float | None = None
    ) -> LayerState:
        """The state of a layer of this ``rank`` for a target; one that keeps its rank has it as both bounds.

        No stage shrinks another one below its own final rank, and the ``last`` stage brings it to that rank.
        """
        layer, own = self.layers[name], self.bounds[name]
        lowest = own.final_rank or own.lowest or 1
        highest = min(layer.max_rank, own.highest or layer.max_rank)
        if self.keeps_rank(name):
            lowest = highest = rank
        elif own.final_rank is not None and last:
            highest = own.final_rank
        known: dict[str, Any] = {"values": values, "importance": importance, "num_products": layer.num_products}
        return LayerState(rank, layer.d_out, layer.d_in, lowest, highest, final_rank=own.final_rank, **known)

    def expected_states(self, ranks: Mapping[str, int], *, last: bool) -> dict[str, LayerState]:
        """The states at these ranks if the values of all layers are 1, 1/2, 1/3, ..."""
        falling = {name: 1 / torch.arange(1, rank + 1, dtype=torch.float64) for name, rank in ranks.items()}
        return {name: self.state(name, ranks[name], last=last, values=falling[name]) for name in self.layers}

    def expected_ranks(self, stage: Stage, ranks: Mapping[str, int], *, last: bool) -> dict[str, int]:
        """The ranks after ``stage``, in the same case."""
        return self.ranks_by(stage, self.expected_states(ranks, last=last))

    def ranks_by(self, stage: Stage, states: Mapping[str, LayerState]) -> dict[str, int]:
        """The ranks that the target of ``stage`` gives; layers that it leaves out keep theirs.

        One of a user's that breaks bounds of a layer is refused.
        """
        ranks = {name: state.rank for name, state in states.items()} | stage.to.ranks(states)
        for name, own in self.bounds.items():
            state = states[name]
            is_free = own == FREE and state.lowest < state.highest
            # A shrinking target leaves a layer below its bounds as it is, a growing one a layer above them.
            if is_free or ranks[name] == state.rank or state.lowest <= ranks[name] <= state.highest:
                continue
            raise ConfigurationError(
                f"{shown(stage.to)} gives rank {ranks[name]} to the layer {name!r}, whose lowest rank is "
                f"{state.lowest} and highest {state.highest}, by rank_map or because it is frozen; let its ranks() "
                "return layer.shrunk(rank) or layer.grown(rank), which keep that",
                *stage.arguments,
            )
        return ranks

    def check_reached(self, ends: Mapping[str, int]) -> None:
        """Refuse bounds that the schedule, which leads to the ranks ``ends``, does not reach.

        Ends are within the bounds whatever the data, unless a layer is frozen, or no stage lowers or raises its rank.
        """
        faults = []
        for name, end in ends.items():
            own = self.bounds[name]
            least, most = own.final_rank or own.lowest or end, own.final_rank or own.highest or end
            if not least <= end <= most:
                why = "it is frozen" if self._is_frozen(name) else "no stage brings it further"
                faults.append(f"{name!r} ends at rank {end}, because {why}, outside of its {described(own)}")
        if faults:
            raise ConfigurationError(
                "rank_map does not fit the schedule; let a rule allow the rank that its layers reach:\n  "
                + "\n  ".join(faults[:20]),
                "rank_map",
            )
