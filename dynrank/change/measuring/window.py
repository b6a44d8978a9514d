"""Everything that one change of ranks needs to have measured, collected together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dynrank.change.measuring.collector import Collector
from dynrank.change.measuring.gradient_sketch import GradientSketch
from dynrank.change.measuring.grams import Grams
from dynrank.change.measuring.sensitivity import Sensitivity
from dynrank.layers.ranked import RankedLayer


@dataclass(frozen=True)
class Needs:
    """What a change needs: Gram matrices, sensitivities, a sketch of the gradient for so many new directions."""

    grams: bool = False
    scores: bool = False
    new_rows: int = 0

    def __bool__(self) -> bool:
        return self.grams or self.scores or self.new_rows > 0


class Window:
    """The collectors that a change needs, open over some training steps until :meth:`close`.

    What they hold is alike in all processes after every :meth:`end_step`, which is the only collective call: any
    process may save the state by itself.

    Args:
        layers: name -> layer.
        needs: what to collect.
        span: steps that the exponential means reach over.
        seed: of what is drawn at random.

    Attributes:
        steps: how many optimizer steps it has seen.
        grams: the Gram matrices, None where they are not needed.
        scores: the sensitivities, or None.
        sketch: the sketch of the gradient, or None.
    """

    def __init__(self, layers: Mapping[str, RankedLayer], needs: Needs, span: int, seed: int = 0) -> None:
        self.steps = 0
        self.grams = Grams(layers, span) if needs.grams else None
        self.scores = Sensitivity(layers) if needs.scores else None
        self.sketch = GradientSketch(layers, needs.new_rows, seed) if needs.new_rows else None

    def serves(self, needs: Needs) -> bool:
        """Whether everything that ``needs`` names is being collected (new rows beyond those sketched are random)."""
        wanted = {"grams": needs.grams, "scores": needs.scores, "sketch": needs.new_rows > 0}
        return self._open.keys() >= {name for name, wants in wanted.items() if wants}

    @property
    def _open(self) -> dict[str, Collector]:
        named = {"grams": self.grams, "scores": self.scores, "sketch": self.sketch}
        return {name: collector for name, collector in named.items() if collector is not None}

    def end_step(self) -> None:
        """Say that an optimizer step was made; gradients must still be there. A collective call."""
        self.steps += 1
        for collector in self._open.values():
            collector.end_step()

    def close(self) -> None:
        """Take everything out of the layers; what was collected stays."""
        for collector in self._open.values():
            collector.close()

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors; passes since the last optimizer step are those of this process alone."""
        return {"steps": self.steps, **{name: collector.state_dict() for name, collector in self._open.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]
        for name, collector in self._open.items():
            collector.load_state_dict(state[name])
