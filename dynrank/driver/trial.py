"""A change of ranks on trial: it is undone after success, an error or an interrupt, unless it is kept."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch

from dynrank.change.replacement import Snapshot, uninterrupted
from dynrank.driver.training import Batches, Training


class Trial:
    """A ``with`` block in which ranks may change; its end restores them, also after an error or Ctrl-C.

    Ranks, factors, optimizer state and averages are restored bit for bit. An interrupt may come while the block ends,
    so enter it twice: ``with trial, trial:``.
    """

    def __init__(self, training: Training) -> None:
        self._training = training
        self._before: Snapshot | None = None

    def keep(self) -> None:
        """Keep the present state: the end of the block then restores nothing."""
        self._before = None

    def undo(self) -> None:
        """Restore the state at the start of the block; another change may be tried then."""
        if self._before is not None:
            with uninterrupted():
                self._training.before_resize()
                self._before.restore()
                self._training.after_resize()

    def __enter__(self) -> None:
        self._before = self._before or Snapshot(
            self._training.model, self._training.optimizers, self._training.averages
        )

    def __exit__(self, *_: object) -> None:
        self.undo()
        self.keep()


def validate(training: Training, monitor: str) -> tuple[Mapping[str, float], Batches]:
    """Validate for a change, and restore the random generators and the model's buffers afterwards.

    So all validations for one change draw the same random numbers, and shuffled data come in the same order.
    """
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    buffers = [(buffer, buffer.clone()) for buffer in training.model.buffers() if buffer.device.type != "meta"]
    try:
        return training.validate_batches(monitor)
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)
        for buffer, before in buffers:
            if not torch.equal(buffer, before):
                buffer.copy_(before)
