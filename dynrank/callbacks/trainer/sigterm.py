"""Noticing SIGTERM without being interrupted by it, as before a job is preempted."""

from __future__ import annotations

import signal
import threading

from lightning.pytorch import Trainer


class SigtermNotice:
    """Takes SIGTERM over until the trainer's teardown, which puts back what was there before Lightning's own handler.

    Lightning's handler would end the run at the next batch, whether a step is complete there or not, and of several
    processes the one that it interrupts takes part in a broadcast that the others do not make.
    """

    def __init__(self) -> None:
        self._received = False

    def take_over(self) -> None:
        """From now on notice it; Lightning's handler has to be there (it comes after ``on_fit_start``)."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)

    def received(self, trainer: Trainer) -> bool:
        """Whether any process has been told to end; collective."""
        if trainer.world_size == 1:
            return self._received
        return trainer.strategy.reduce_boolean_decision(self._received, all=False)

    def _note(self, number: int, frame: object) -> None:
        self._received = True
