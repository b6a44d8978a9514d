"""Watching the gates of all layers over the training steps before a change of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dynrank.change.gates import FEW, Gates
from dynrank.driver.bounds import bounded
from dynrank.driver.training import Training
from dynrank.layers.finding import lora_layers
from dynrank.layers.ranked import RankedLayer
from dynrank.schedules import Stage
from dynrank.targets import Smallest

# Where trials decide how far a cut goes: one wrong direction at its start would end them.
CAUTION = 2.0

_UNSEEN = "by weight: no gradient was seen while gates were watched"


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
        # Of the stage that they are watched for.
        self._index = 0
        self.gates: Gates | None = None

    def needed(self, model: nn.Module, index: int) -> bool:
        """Whether stage number ``index`` needs gates."""
        return must_watch(self._stages[index], dict(lora_layers(model)))

    def begin(self, model: nn.Module, index: int) -> None:
        """Watch what stage number ``index`` needs, if anything; what was collected before is dropped."""
        self.end()
        if self.needed(model, index):
            how, target = self._stages[index].how, self._stages[index].to
            layers = {name: layer for name, layer in lora_layers(model) if not layer.pinned}
            caution = CAUTION if isinstance(target, Smallest) else 0.0
            self.gates, self._index = Gates(model, layers, how.window, how.loss_terms, caution), index

    def end(self) -> Gates | None:
        """Leave the layers; return the gates that were watched."""
        gates, self.gates = self.gates, None
        if gates is not None:
            gates.close()
        return gates

    def result(self, training: Training, index: int, reason: str) -> tuple[Gates | None, str]:
        """Leave the layers; return the gates for stage ``index``, if it needs any, and ``reason`` with what was seen.

        Where nothing was seen the change is made by weight. A choice that is mostly noise is warned of.
        """
        gates = self.end()
        if not self.needed(training.model, index):
            return None, reason
        if gates is None or not gates.examples:
            if gates is not None and gates.skipped == gates.steps > 0:
                # Training has diverged, which this says.
                gates.values()
            return None, f"{reason}, {_UNSEEN}"
        if gates.samples < FEW:
            more = ", smaller batches with accumulation" if gates.by_pass else ""
            training.warn(
                f"the directions to keep were chosen by {gates.seen}, fewer than {FEW} samples: mostly by noise; a "
                f"later time of the change, a higher schedule.how.window{more} or longer training shows more"
            )
        if gates.unreached:
            names, count = ", ".join(map(repr, gates.unreached[:5])), len(gates.unreached)
            training.warn(
                f"no gradient has reached {names} while other layers had one, so gates say that the loss needs nothing "
                f"of these {count} layers; pin them (lora.rank_map), leave them out (lora.target_modules), or set "
                "schedule.how.metric=weight"
            )
        return gates, f"{reason}, {gates.seen}"

    def state_dict(self) -> dict[str, Any] | None:
        return {"stage": self._index, **self.gates.state_dict()} if self.gates is not None else None

    def load_state_dict(self, state: Mapping[str, Any] | None, model: nn.Module) -> None:
        """Go on watching as when ``state`` was taken."""
        if state is not None:
            self.begin(model, state["stage"])
            # Otherwise the stage is made by weight from here on.
            if self.gates is not None:
                self.gates.load_state_dict(state)
