"""The part that all collectors share: tensors by layer that training steps add to, their state, and their end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dynrank.distributed.processes import average_over_processes
from dynrank.layers.ranked import RankedLayer


class Collector:
    """Tensors by layer that each training step adds to, on the layer's device.

    After every :meth:`end_step` they are alike in all processes, so one process alone may save them, and any number of
    processes may go on from them.
    """

    def __init__(self, layers: Mapping[str, RankedLayer]) -> None:
        self._layers = dict(layers)
        self._tensors: dict[str, dict[str, Tensor]] = {}  # by layer, then by what they are
        self._stops: list[Callable[[], None]] = []  # each takes something out of a layer

    def end_step(self) -> None:
        """Say that an optimizer step was made; a collective call, which averages over all processes."""
        average_over_processes(tensor for tensors in self._tensors.values() for tensor in tensors.values())

    def close(self) -> None:
        """Stop collecting; what was collected stays."""
        for stop in self._stops:
            stop()
        self._stops = []

    def state_dict(self) -> dict[str, Any]:
        return {name: dict(tensors) for name, tensors in self._tensors.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._tensors = {
            name: {key: tensor.to(self._layers[name].lora_A.device, copy=True) for key, tensor in tensors.items()}
            for name, tensors in state.items()
        }
