"""Watching the gates of all layers over the training steps before a change of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dynrank.change.gates import Gates
from dynrank.driver.bounds import bounded
from dynrank.layers.finding import lora_layers
from dynrank.layers.ranked import RankedLayer
from dynrank.schedules import Stage
from dynrank.targets import Smallest

CAUTION = 2.0  # where trials decide how far a cut goes: one wrong direction at its start would end them


def must_watch(stage: Stage, layers: Mapping[str, RankedLayer]) -> bool:
    """Whether ``stage`` needs gates before it may change ``layers``, be it the last stage or not."""
    if stage.how.metric == "weight":
        return False
    lowest = {name: [stage.to.reach(bounded(la, last))[0] for last in (False, True)] for name, la in layers.items()}
    return bool(stage.to.needs) or any(min(lowest[name]) < layer.rank for name, layer in layers.items())


class Watching:
    """The gates of all layers, watched over the steps before a change of one stage.

    Args:
        stages: of the schedule.

    Attributes:
        gates: those that are watched; None while none are.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = stages
        self._index = 0  # of the stage that they are watched for
        self.gates: Gates | None = None

    def needed(self, model: nn.Module, index: int) -> bool:
        """Whether stage number ``index`` needs gates."""
        return must_watch(self._stages[index], dict(lora_layers(model)))

    def begin(self, model: nn.Module, index: int) -> None:
        """Watch what stage number ``index`` needs, if anything; what was collected before is dropped."""
        self.end()
        if self.needed(model, index):
            layers, how = (
                {name: layer for name, layer in lora_layers(model) if not layer.pinned},
                self._stages[index].how,
            )
            caution = CAUTION if isinstance(self._stages[index].to, Smallest) else 0.0
            self.gates, self._index = Gates(layers, how.window, how.loss_terms, model, caution), index

    def end(self) -> Gates | None:
        """Leave the layers; return the gates that were watched."""
        gates, self.gates = self.gates, None
        if gates is not None:
            gates.close()
        return gates

    def state_dict(self) -> dict[str, Any] | None:
        return {"stage": self._index, **self.gates.state_dict()} if self.gates is not None else None

    def load_state_dict(self, state: Mapping[str, Any] | None, model: nn.Module) -> None:
        """Go on watching as when ``state`` was taken."""
        if state is not None:
            self.begin(model, state["stage"])
            assert self.gates is not None  # the same stage needs the same
            self.gates.load_state_dict(state)
