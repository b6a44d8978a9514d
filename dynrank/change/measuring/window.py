"""Everything that one change of ranks needs to have measured, collected together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    """The collectors that a change needs, open over some training steps.

    Args:
        layers: name -> layer.
        needs: what to collect.
        span: steps that the exponential means reach over.
        seed: of what is drawn at random.
    """

    def __init__(self, layers: Mapping[str, RankedLayer], needs: Needs, span: int, seed: int) -> None:
        self.steps = 0
        self.grams = Grams(layers, span) if needs.grams else None
        self.scores = Sensitivity(layers) if needs.scores else None
        self.sketch = GradientSketch(layers, needs.new_rows, seed) if needs.new_rows else None

    def serves(self, needs: Needs) -> bool:
        """Whether everything that ``needs`` names is being collected (new rows beyond those sketched are random)."""
        opened = self.grams is not None, self.scores is not None, self.sketch is not None
        return all(
            has or not need for has, need in zip(opened, (needs.grams, needs.scores, needs.new_rows), strict=True)
        )

    @property
    def _open(self) -> dict[str, Grams | Sensitivity | GradientSketch]:
        named = {"grams": self.grams, "scores": self.scores, "sketch": self.sketch}
        return {name: collector for name, collector in named.items() if collector is not None}

    def end_step(self) -> None:
        """Say that an optimizer step was made; gradients must still be there."""
        self.steps += 1
        for collector in self._open.values():
            collector.end_step()

    def close(self) -> None:
        """Take everything out of the layers; what was collected stays."""
        for collector in self._open.values():
            collector.close()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, **{name: collector.state_dict() for name, collector in self._open.items()}}

    def sum_over_processes(self) -> None:
        """Make of what each process has collected what all have; collective, and once."""
        for collector in self._open.values():
            collector.sum_over_processes()

    def load_states(self, states: Sequence[Mapping[str, Any]], index: int, count: int) -> None:
        """Go on from what was collected before, as process ``index`` of ``count``.

        Args:
            states: a state dict from each process of the run that is resumed; there may have been more or fewer.
            index: number of this process.
            count: how many processes there are now.
        """
        self.steps = states[0]["steps"]
        for name, collector in self._open.items():
            shares = [state[name] for state in states[index::count]]
            if isinstance(collector, Sensitivity):
                collector.load_state_dict(states[0][name])  # the same in all
            else:
                collector.load_state_dict(*shares, growth=count / len(states))
