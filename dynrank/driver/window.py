"""Measuring the gates of all layers (:mod:`dynrank.change.gates`) over the steps before a change of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dynrank.change.gates import FEW, Gates
from dynrank.driver.check import expected_states
from dynrank.driver.training import Training
from dynrank.layers.base import RankedLayer
from dynrank.layers.finding import lora_layers
from dynrank.schedules import Stage

# For a search, in standard errors: one wrongly dropped direction early in the order would stop the bisection.
CAUTION = 2.0

_UNSEEN = "by weight: no gradient was seen while gates were measured"


def needs_gates(stage: Stage, layers: Mapping[str, RankedLayer], *, last: bool) -> bool:
    """Whether ``stage`` needs gates before it may change ``layers``; ``last``: whether it is the last stage."""
    if stage.how.metric == "weight":
        return False
    if stage.to.needs:
        return True
    now = {name: layer.rank for name, layer in layers.items()}
    after = stage.to.ranks(expected_states(layers, now, last=last))
    return any(after[name] < rank for name, rank in now.items())


class Window:
    """Measures the gates of all layers over the steps before the change of one stage.

    Args:
        stages: the stages of the schedule.

    Attributes:
        gates: the gates that are measured now; None if none are.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = stages
        # Index of the stage for which gates are measured.
        self._index = 0
        self.gates: Gates | None = None

    def needed(self, model: nn.Module, index: int) -> bool:
        """Whether stage ``index`` needs gates."""
        last = index == len(self._stages) - 1
        return needs_gates(self._stages[index], dict(lora_layers(model)), last=last)

    def begin(self, model: nn.Module, index: int) -> None:
        """Begin to measure the gates that stage ``index`` needs, if any; drop what was measured before."""
        self.end()
        if self.needed(model, index):
            stage = self._stages[index]
            layers = {name: layer for name, layer in lora_layers(model) if not layer.pinned}
            caution = CAUTION if stage.search else 0.0
            self.gates = Gates(model, layers, stage.how.window, stage.how.loss_terms, caution)
            self._index = index

    def end(self) -> Gates | None:
        """Remove the hooks from the layers; return the measured gates."""
        gates, self.gates = self.gates, None
        if gates is not None:
            gates.close()
        return gates

    def result(self, training: Training, index: int, reason: str) -> tuple[Gates | None, str]:
        """Stop measuring; return the gates for stage ``index`` and ``reason``, which then names the samples.

        Without any sample the gates are None, and the change is made by weight. Few samples give a warning.
        """
        gates = self.end()
        if not self.needed(training.model, index):
            return None, reason
        if gates is None or not gates.examples:
            if gates is not None and gates.skipped == gates.steps > 0:
                # No step had finite gradients: this call raises DivergedError.
                gates.values()
            return None, f"{reason}, {_UNSEEN}"
        if gates.samples < FEW:
            more = ", smaller batches with accumulation" if gates.by_pass else ""
            training.warn(
                f"the directions to keep were chosen by {gates.seen}, fewer than {FEW} samples, so mostly by noise; "
                f"for more samples change ranks later, set a higher schedule.how.window{more} or train longer"
            )
        if gates.unreached:
            names = ", ".join(map(repr, gates.unreached[:5])) + (", ..." if len(gates.unreached) > 5 else "")
            training.warn(
                f"no gradient has reached {names} while other layers had one, so gates rate all of their directions as "
                "useless; pin these layers (lora.rank_map), leave them out (lora.target_modules), or set "
                "schedule.how.metric=weight"
            )
        return gates, f"{reason}, {gates.seen}"

    def state_dict(self) -> dict[str, Any] | None:
        return {"stage": self._index, **self.gates.state_dict()} if self.gates is not None else None

    def load_state_dict(self, state: Mapping[str, Any] | None, model: nn.Module) -> None:
        """Continue to measure from ``state``."""
        if state is not None:
            self.begin(model, state["stage"])
            # The stage may no longer need gates, for example with metric=weight.
            if self.gates is not None:
                self.gates.load_state_dict(state)
