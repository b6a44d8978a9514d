"""A stage that is due, and the present states of the layers that its target reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from dynrank.change.change import Change
from dynrank.change.directions import LayerDirections
from dynrank.change.reports import LayerReport
from dynrank.driver.bounds import BoundLayers
from dynrank.driver.event import Measured, RankEvent
from dynrank.driver.learning_rates import factor_of_change
from dynrank.driver.training import Training
from dynrank.importance.importance import LayerImportance
from dynrank.layers.finding import lora_layers
from dynrank.rank_map import RankBounds
from dynrank.schedules import Stage
from dynrank.targets import LayerState


class DueStage:
    """A stage whose change is due, with the present layers of a run.

    Args:
        training: the run.
        stage: the stage.
        reason: why it is due.
        bounds: {layer: what its rank may become}.
        importance: {layer: its importance}; empty if unknown.
        last: whether it is the last stage of the schedule.

    Attributes:
        layers: the layers of the model, with the bounds of their ranks.
    """

    def __init__(
        self,
        training: Training,
        stage: Stage,
        reason: str,
        bounds: Mapping[str, RankBounds],
        importance: Mapping[str, LayerImportance],
        *,
        last: bool,
    ) -> None:
        self.training = training
        self.stage = stage
        self.reason = reason
        self.layers = BoundLayers(dict(lora_layers(training.model)), bounds)
        self._importance = importance
        self._last = last
        # Only of the layers that may change: a pinned one is not decomposed, and its factors may even be not finite.
        free = {name: layer for name, layer in self.layers.layers.items() if not bounds[name].pinned}
        self._directions = LayerDirections(free)

    def states(self) -> dict[str, LayerState]:
        """The state of each layer that the stage's target reads."""
        needs = self.stage.to.needs
        scores = {name: each.score for name, each in self._importance.items()} if "importance" in needs else {}
        values = self._directions.values() if "values" in needs else {}
        states = {}
        for name, rank in self.layers.ranks.items():
            # A pinned layer keeps its rank, so no target reads its values.
            nothing = torch.zeros(rank, dtype=torch.float64) if "values" in needs else None
            states[name] = self.layers.state(
                name, rank, last=self._last, values=values.get(name, nothing), importance=scores.get(name)
            )
        return states

    def ranks(self) -> dict[str, int]:
        """The ranks that the stage's target gives for the present state of the layers."""
        return self.layers.ranks_by(self.stage, self.states())

    def change(self, plan: Callable[[], Mapping[str, int]]) -> Change:
        """The change to the ranks that ``plan`` returns, which is not yet made; a collective call."""
        how = self.stage.how.optimizer_state
        return Change.in_run(self.training.adapters, plan, self._directions, how, self.training.step)

    def event(
        self, reports: Sequence[LayerReport], reason: str, measured: Measured | None = None, *, undone: bool = False
    ) -> RankEvent:
        """The event of a change, with the importance of each of its layers, where that is known."""
        layers = []
        for report in reports:
            known = self._importance.get(report.layer)
            if known is not None:
                report = replace(report, importance=known.value, importance_error=known.error)
            layers.append(report)
        before = self.layers.ranks | {report.layer: report.rank_before for report in reports}
        after = self.layers.ranks | {report.layer: report.rank_after for report in reports}
        factor = 1.0 if undone else factor_of_change(self.stage.how, before, after)
        return RankEvent(self.training.step, reason, tuple(layers), undone, measured, factor)

    def warn_of_unknown(self, unmeasured: Sequence[str]) -> None:
        """Warn if there is no importance of some of the layers that share ranks by it, or of any."""
        free = [name for name in self.layers.layers if not self.layers.keeps_rank(name)]
        unknown = [name for name in unmeasured if name in free]
        if unknown and len(unknown) == len(free):
            self.training.warn(
                f"the change of rank at step {self.training.step} shares ranks by importance, and nothing is known of "
                "any layer, so all layers count alike: no gradients of the adapters were there when a step ended"
            )
        elif unknown:
            self.training.warn(
                f"{len(unknown)} of {len(free)} layers, {unknown[0]!r} first, had no gradients before the change of "
                f"rank at step {self.training.step}, so they count as unimportant. If a module reads their weights "
                "without calling them, their LoRA does nothing: leave them out of target_modules"
            )
