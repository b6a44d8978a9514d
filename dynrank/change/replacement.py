"""New factors and optimizer state, put in the place of the old ones all at once; and the old ones, kept to go back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynrank.change.averages import averaged_layers
from dynrank.distributed.unwrapping import unwrapped_optimizer
from dynrank.layers.compiled import forget_compiled
from dynrank.layers.finding import lora_layers
from dynrank.layers.peft_layers import config_changes
from dynrank.layers.peft_view import PeftLayer
from dynrank.layers.ranked import RankedLayer

# The state of one parameter in an optimizer.
State = dict[str, Any]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A block that Ctrl-C leaves whole: it comes at the end. Threads beside the main one are never interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if pressed:
            signal.raise_signal(signal.SIGINT)


@dataclass
class Replacement:
    """All that a change of ranks replaces, complete before the first assignment.

    Attributes:
        factors: (layer, its lora_A, its lora_B), of the model's layers and of its averages'.
        states: (optimizer, parameter, the parameter's state), empty where the optimizer is to forget it.
        modules: the model and its averages, whose PEFT configs follow the ranks.
    """

    factors: list[tuple[RankedLayer, Tensor, Tensor]] = field(default_factory=list)
    states: list[tuple[Optimizer, nn.Parameter, State]] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)

    def put(self) -> None:
        """Replace everything, by assignments alone; Ctrl-C on the way comes when all is done."""
        peft = [(layer, len(lora_A)) for layer, lora_A, _ in self.factors if isinstance(layer, PeftLayer)]
        ranks = {(layer.module, layer.adapter): rows // layer.experts for layer, rows in peft}
        configs = [change for module in self.modules for change in config_changes(module, ranks)]
        with uninterrupted():
            for layer, lora_A, lora_B in self.factors:
                layer.set_factors(lora_A, lora_B)
            for optimizer, parameter, state in self.states:
                if state:
                    optimizer.state[parameter] = state
                else:
                    optimizer.state.pop(parameter, None)
            for change in configs:
                change()
            forget_compiled()

    def made(self) -> Iterator[Tensor]:
        """The tensors that were made for it, on the parameters' devices; what a state keeps is not among them."""
        for _, *factors in self.factors:
            yield from factors
        for optimizer, parameter, state in self.states:
            old = optimizer.state[parameter]
            tensors = (v for key, v in state.items() if isinstance(v, Tensor) and v is not old.get(key))
            yield from (tensor for tensor in tensors if tensor.device == parameter.device)

    def copy(self) -> Replacement:
        """A replacement with the same values in tensors of its own."""
        return Replacement(
            [(layer, lora_A.detach().clone(), lora_B.detach().clone()) for layer, lora_A, lora_B in self.factors],
            [(optimizer, parameter, _copied(state)) for optimizer, parameter, state in self.states],
            self.modules,
        )


def _copied(state: State) -> State:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}


class Snapshot:
    """Everything that :func:`dynrank.resize` may change of model, optimizers and averages, to be put back exactly."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, optimizers: Iterable[Optimizer], averages: Iterable[nn.Module] = ()) -> None:
        layers = dict(lora_layers(model))
        followers = averaged_layers(averages, layers)
        everywhere = [*layers.values(), *(layer for _, own in followers for layer in own.values())]
        now = Replacement(
            [(layer, layer.lora_A, layer.lora_B) for layer in everywhere],
            [
                (optimizer, parameter, optimizer.state.get(parameter, {}))
                for optimizer in map(unwrapped_optimizer, optimizers)
                for layer in layers.values()
                for parameter in (layer.lora_A, layer.lora_B)
            ],
            [model, *(average for average, _ in followers)],
        )
        self._saved = now.copy()

    def restore(self) -> None:
        """Put back factors, ranks and optimizer state, bit for bit; as often as is needed."""
        self._saved.copy().put()
