"""A change of ranks on trial: whatever happens in it, all is as it was before, unless the change is kept."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from dynrank.change.replacement import Snapshot
from dynrank.driver.training import Training


class Trial:
    """A ``with`` block in which ranks may change; they go back at its end, also after an error or Ctrl-C.

    Ranks, factors, optimizer state and averages come back to the bit. An interrupt may come at the very end of the
    block, too, so it is entered twice: ``with trial, trial:``.
    """

    def __init__(self, training: Training) -> None:
        self._training, self._kept = training, False
        self._snapshot: Snapshot | None = None

    def keep(self) -> None:
        """Let the change stay."""
        self._kept = True

    def __enter__(self) -> Trial:
        if self._snapshot is None:
            self._snapshot = Snapshot(self._training.model, self._training.optimizers, self._training.averages)
        return self

    def __exit__(self, *_: object) -> None:
        if self._snapshot is not None and not self._kept:
            self._training.before_resize()
            self._snapshot.restore()
            self._training.after_resize()
            self._snapshot = None


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put back what validations move at the end: the random generators, and the model's buffers."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if buffer.device.type != "meta"]
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)
        for buffer, before in buffers:
            if not torch.equal(buffer, before):
                buffer.copy_(before)
