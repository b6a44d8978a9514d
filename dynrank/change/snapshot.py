"""A copy of what a change of ranks replaces, and the change back to it."""

from __future__ import annotations

import copy

from dynrank.change.change import Adapters, Change


class Snapshot:
    """A copy of everything that a change of ranks may change in ``adapters``."""

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = adapters
        layers = adapters.layers
        factors = {name: (layer.lora_A.detach(), layer.lora_B.detach()) for name, layer in layers.items()}
        states = [
            {
                name: {factor: optimizer.state.get(getattr(layer, factor), {}) for factor in ("lora_A", "lora_B")}
                for name, layer in layers.items()
            }
            for optimizer in adapters.optimizers
        ]
        self._saved = copy.deepcopy((factors, states))

    def change_back(self) -> Change:
        """The change that restores factors, ranks and optimizer state bit for bit; it can be made repeatedly."""
        factors, states = copy.deepcopy(self._saved)
        return Change(self._adapters, factors, states, [])
