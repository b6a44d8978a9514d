"""Noticing SIGTERM, as it comes before a job is preempted, without being interrupted by it."""

from __future__ import annotations

import signal
import threading

from lightning.pytorch import Trainer


class SigtermNotice:
    """Notices SIGTERM from now until the trainer's teardown, which puts back the handler from before Lightning's own.

    Lightning's handler would end the run at the next batch, whether a step is complete there or not, and of several
    processes the one that it interrupts takes part in a broadcast that the others do not make. It has to be there
    already, as it is from the trainer's start of training on.
    """

    def __init__(self) -> None:
        self._received = False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)

    def received(self, trainer: Trainer) -> bool:
        """Whether any process has been told to end; a collective call."""
        if trainer.world_size == 1:
            return self._received
        return trainer.strategy.reduce_boolean_decision(self._received, all=False)

    def _note(self, number: int, frame: object) -> None:
        self._received = True
