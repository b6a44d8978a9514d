"""Measuring what a change of ranks needs to know, over the training steps before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dynrank.change.measuring import Needs, Window
from dynrank.driver.bounds import bounded
from dynrank.layers.finding import lora_layers
from dynrank.layers.ranked import RankedLayer
from dynrank.schedules import How, Stage


def needs_of(stage: Stage, how: How, layers: Mapping[str, RankedLayer]) -> Needs:
    """What has to be measured before ``stage`` may change ``layers``, be it the last stage or not."""
    reaches = [
        (layer.rank, *stage.to.reach(bounded(layer, last))) for layer in layers.values() for last in (False, True)
    ]
    growth = max([0, *(high - rank for rank, _, high in reaches)])
    shrinks = any(low < rank for rank, low, _ in reaches)
    return Needs(
        grams=how.metric != "weight" and (shrinks or "values" in stage.to.needs),
        scores="scores" in stage.to.needs,
        new_rows=growth if how.new_rows == "gradient" else 0,
    )


class Measuring:
    """At most one window of collectors, open over the steps before a change of one stage.

    Args:
        stages: of the schedule.
        hows: how each of them changes ranks.

    Attributes:
        window: what is being collected; None outside of a window.
    """

    def __init__(self, stages: Sequence[Stage], hows: Sequence[How]) -> None:
        self._stages, self._hows = stages, hows
        self._index = 0  # of the stage that the window was opened for
        self.window: Window | None = None

    def needs(self, model: nn.Module, index: int) -> Needs:
        """What stage number ``index`` needs to have measured."""
        return needs_of(self._stages[index], self._hows[index], dict(lora_layers(model)))

    def begin(self, model: nn.Module, index: int) -> None:
        """Collect what stage number ``index`` needs, if anything; what was collected before is dropped."""
        self.end()
        needs = self.needs(model, index)
        if needs:
            layers = {name: layer for name, layer in lora_layers(model) if not layer.pinned}
            self.window, self._index = Window(layers, needs, self._hows[index].window, seed=index), index

    def end(self) -> Window | None:
        """Leave the layers; return what was collected."""
        window, self.window = self.window, None
        if window is not None:
            window.close()
        return window

    def state_dict(self) -> dict[str, Any] | None:
        return {"stage": self._index, "collected": self.window.state_dict()} if self.window is not None else None

    def load_state_dict(self, state: Mapping[str, Any] | None, model: nn.Module) -> None:
        """Open the window again that was open when ``state`` was taken."""
        if state is not None:
            self.begin(model, state["stage"])
            assert self.window is not None  # the same stage needs the same
            self.window.load_state_dict(state["collected"])
