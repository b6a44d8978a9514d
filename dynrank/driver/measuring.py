"""Measuring what a change of ranks needs to know, over the training steps before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dynrank.change.measuring import Moments
from dynrank.driver.bounds import bounded
from dynrank.layers.finding import lora_layers
from dynrank.layers.ranked import RankedLayer
from dynrank.schedules import How, Stage


def must_measure(stage: Stage, how: How, layers: Mapping[str, RankedLayer]) -> bool:
    """Whether ``stage`` needs moments before it may change ``layers``, be it the last stage or not."""
    if how.metric == "weight":
        return False
    lowest = {name: [stage.to.reach(bounded(la, last))[0] for last in (False, True)] for name, la in layers.items()}
    return bool(stage.to.needs) or any(min(lowest[name]) < layer.rank for name, layer in layers.items())


class Measuring:
    """The moments of all layers, collected over the steps before a change of one stage.

    Args:
        stages: of the schedule.
        hows: how each of them changes ranks.

    Attributes:
        moments: what is being collected; None while nothing is.
    """

    def __init__(self, stages: Sequence[Stage], hows: Sequence[How]) -> None:
        self._stages, self._hows = stages, hows
        self._index = 0  # of the stage that they are collected for
        self.moments: Moments | None = None

    def needed(self, model: nn.Module, index: int) -> bool:
        """Whether stage number ``index`` needs moments."""
        return must_measure(self._stages[index], self._hows[index], dict(lora_layers(model)))

    def begin(self, model: nn.Module, index: int) -> None:
        """Collect what stage number ``index`` needs, if anything; what was collected before is dropped."""
        self.end()
        if self.needed(model, index):
            layers = {name: layer for name, layer in lora_layers(model) if not layer.pinned}
            self.moments, self._index = Moments(layers, self._hows[index].window), index

    def end(self) -> Moments | None:
        """Leave the layers; return what was collected."""
        moments, self.moments = self.moments, None
        if moments is not None:
            moments.close()
        return moments

    def state_dict(self) -> dict[str, Any] | None:
        return {"stage": self._index, **self.moments.state_dict()} if self.moments is not None else None

    def load_state_dict(self, state: Mapping[str, Any] | None, model: nn.Module) -> None:
        """Go on collecting as when ``state`` was taken."""
        if state is not None:
            self.begin(model, state["stage"])
            assert self.moments is not None  # the same stage needs the same
            self.moments.load_state_dict(state)
