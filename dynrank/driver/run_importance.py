"""The importance of layers over a run, as long as a stage to come shares ranks by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dynrank.driver.training import ImportanceSteps, Training
from dynrank.importance.importance import ImportanceSums, LayerImportance, shares_by_importance
from dynrank.layers.ranked_layer import RankedLayer
from dynrank.schedules import Stage


class RunImportance:
    """Measures importance from :meth:`start` to :meth:`stop`, and goes on from a checkpoint's."""

    def __init__(self) -> None:
        # None before start(), and when no remaining stage asks for it.
        self._sums: ImportanceSums | None = None
        # As long as importance is measured.
        self._steps: ImportanceSteps | None = None
        # That of a checkpoint, until start() brings the layers.
        self._loaded: Mapping[str, Any] | None = None

    def start(self, training: Training, layers: Mapping[str, RankedLayer], stages: Sequence[Stage]) -> None:
        """Measure ``layers`` from here on, if one of the ``stages`` to come shares ranks by importance."""
        self.stop()
        if not shares_by_importance(stages):
            self._sums = None
        elif self._sums is None or not self._sums.is_of(layers):
            self._sums = training.importance_of(layers)
        else:
            self._sums.forget_last_update()
        if self._sums is not None:
            self._steps = training.steps_of(self._sums)
            if self._loaded is not None:
                self._sums.load_state_dict(self._loaded)
        self._loaded = None

    def end_step(self) -> None:
        """Take the optimizer step just made; its gradients must still exist."""
        if self._steps is not None:
            self._steps.end_step()

    def stage_ended(self, stages: Sequence[Stage], *, changed: bool) -> None:
        """Go on if one of the ``stages`` to come needs it, without the last update if factors have ``changed``."""
        if not shares_by_importance(stages):
            self._sums = None
            self.stop()
        elif changed and self._sums is not None:
            self._sums.forget_last_update()

    def stop(self) -> None:
        """Watch the optimizers no longer."""
        if self._steps is not None:
            self._steps.remove()
        self._steps = None

    def of_layers(self) -> dict[str, LayerImportance]:
        """{layer: its importance}; empty if it is not measured, and before the second step."""
        return {} if self._sums is None else self._sums.of_layers()

    def unmeasured(self) -> list[str]:
        """The layers that have never had an update and a gradient after it."""
        return [] if self._sums is None else self._sums.unmeasured()

    def state_dict(self) -> Mapping[str, Any] | None:
        """Plain containers and tensors; None: nothing is measured."""
        return self._loaded if self._sums is None else self._sums.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Keep what :meth:`state_dict` returned for the start."""
        self.stop()
        self._sums = None
        self._loaded = state
