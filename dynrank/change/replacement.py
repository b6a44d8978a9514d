"""The replacement of all factors and optimizer state by new ones at once, and a copy of the old ones to restore."""

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
from dynrank.distributed.wrappers import unwrapped_optimizer
from dynrank.layers.base import RankedLayer
from dynrank.layers.compiled import forget_compiled
from dynrank.layers.finding import lora_layers
from dynrank.layers.peft_layers import config_changes
from dynrank.layers.peft_view import PeftLayer

# The state of one parameter in an optimizer.
State = dict[str, Any]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C until the end of the block.

    Ctrl-C interrupts the main thread alone, and a handler that was not set by Python cannot be put back.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
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
    """All new values of a change of ranks, complete before the first assignment.

    Attributes:
        factors: (layer, new lora_A, new lora_B) for the layers of the model and of its averages.
        states: (optimizer, parameter, new state of the parameter); an empty state deletes the old one.
        modules: the model and its averages; their PEFT configs get the new ranks.
    """

    factors: list[tuple[RankedLayer, Tensor, Tensor]] = field(default_factory=list)
    states: list[tuple[Optimizer, nn.Parameter, State]] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)

    def put(self) -> None:
        """Replace everything by assignments; Ctrl-C takes effect after the last one."""
        peft = [(layer, len(lora_A)) for layer, lora_A, _ in self.factors if isinstance(layer, PeftLayer)]
        ranks = {(layer.module, layer.adapter): rows // layer.num_products for layer, rows in peft}
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
        """The new tensors on the parameters' devices, without those that a state takes over from the old state."""
        for _, *factors in self.factors:
            yield from factors
        for optimizer, parameter, state in self.states:
            old = optimizer.state[parameter]
            tensors = (v for key, v in state.items() if isinstance(v, Tensor) and v is not old.get(key))
            yield from (tensor for tensor in tensors if tensor.device == parameter.device)

    def copy(self) -> Replacement:
        """A replacement with copies of all tensors."""
        return Replacement(
            [(layer, lora_A.detach().clone(), lora_B.detach().clone()) for layer, lora_A, lora_B in self.factors],
            [(optimizer, parameter, _copied(state)) for optimizer, parameter, state in self.states],
            self.modules,
        )


def _copied(state: State) -> State:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}


class Snapshot:
    """A copy of everything that :func:`dynrank.resize` may change in a model, its optimizers and its averages."""

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
        """Restore factors, ranks and optimizer state bit for bit; may be called repeatedly."""
        self._saved.copy().put()
