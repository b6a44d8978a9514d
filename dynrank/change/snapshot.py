"""A copy of what a change of ranks replaces, and the change back to it."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from dynrank.change.change import Adapters, Change


class Snapshot:
    """A copy of everything that :func:`dynrank.resize` may change in a model and its optimizers."""

    def __init__(self, model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        self._adapters = Adapters(model, optimizers)
        layers = self._adapters.layers
        factors = {name: (layer.lora_A.detach(), layer.lora_B.detach()) for name, layer in layers.items()}
        states = [
            {
                name: {factor: optimizer.state.get(getattr(layer, factor), {}) for factor in ("lora_A", "lora_B")}
                for name, layer in layers.items()
            }
            for optimizer in self._adapters.optimizers
        ]
        self._saved = copy.deepcopy((factors, states))

    def change_back(self) -> Change:
        """The change that restores factors, ranks and optimizer state bit for bit; it can be made repeatedly."""
        factors, states = copy.deepcopy(self._saved)
        return Change(self._adapters, factors, states, [])
