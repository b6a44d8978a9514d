"""A change of ranks on trial: whatever happens in it, all is as it was before, unless the change is kept."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch

from dynrank.change.replacement import Snapshot, uninterrupted
from dynrank.driver.training import Batches, Training


class Trial:
    """A ``with`` block in which ranks may change; they go back at its end, also after an error or Ctrl-C.

    Ranks, factors, optimizer state and averages come back to the bit. An interrupt may come at the very end of the
    block, too, so it is entered twice: ``with trial, trial:``.
    """

    def __init__(self, training: Training) -> None:
        self._training = training
        self._before: Snapshot | None = None

    def keep(self) -> None:
        """Let all stay as it is now."""
        self._before = None

    def undo(self) -> None:
        """Go back to what was there at the start; another change may be tried then."""
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
    """Validate for a change; random generators and the model's buffers are afterwards as they were.

    So all validations for one change draw the same numbers, and shuffled data come in the same order.
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
