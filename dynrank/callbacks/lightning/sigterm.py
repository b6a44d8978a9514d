"""Recording SIGTERM, which a job gets before it is preempted, without an interrupt of the step."""

from __future__ import annotations

import signal
import threading

from lightning.pytorch import Trainer


class SigtermNotice:
    """Records SIGTERM from now until the trainer's teardown, which restores the handler from before training.

    It replaces Lightning's handler, which must be installed already, as it is once training has started. That handler
    would end the run at the next batch, even in the middle of an accumulated step; and with several processes the one
    that got the signal would wait in a broadcast that the others do not make.
    """

    def __init__(self) -> None:
        self._received = False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)

    def received(self, trainer: Trainer) -> bool:
        """Whether any process has received SIGTERM; a collective call."""
        if trainer.world_size == 1:
            return self._received
        return trainer.strategy.reduce_boolean_decision(self._received, all=False)

    def _note(self, number: int, frame: object) -> None:
        self._received = True
