"""Measuring a run: tokens and seconds of training between changes of rank, and the peak memory."""

import re
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dynrank.distributed.processes import from_all
from dynrank.driver.event import RankEvent
from dynrank.layers.finding import lora_layers


@dataclass
class Phase:
    """A part of a run in which ranks do not change.

    Attributes:
        first_step: optimizer steps made before the phase.
        mean_rank: mean rank of the LoRA layers.
        tokens: input tokens without padding: of this process until the phase is over, then of all processes.
        train_seconds: seconds in training batches, without validation.
        step_seconds: median seconds of an optimizer step with all of its batches; 0 until the phase is over.
    """

    first_step: int = 0
    mean_rank: float = 0.0
    tokens: int = 0
    train_seconds: float = 0.0
    step_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.train_seconds if self.train_seconds else 0.0


class RunMeter(Callback):
    """Measures the tokens and the seconds of training, in each phase between changes of rank.

    When a phase is over, loggers get its ``phase/tokens_per_second`` and ``phase/mean_rank``. Batches are mappings with
    an ``attention_mask``. A resumed run measures only what it trains itself.

    Attributes:
        phases: the phases of this run; the last one is open until training ends.
    """

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        # Time at which the batch began, and seconds of batches since the last optimizer step.
        self._start = 0.0
        self._seconds_since_step = 0.0
        # Seconds of each optimizer step of the open phase.
        self._step_seconds: list[float] = []
        self._steps_made = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps_made = trainer.global_step
        self._begin(trainer, pl_module)
        if torch.cuda.is_available():
            # A sweep makes several runs in one process.
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        phase = self.phases[-1]
        # Reading the sum waits for the device, so the clock is read after it.
        phase.tokens += int(batch["attention_mask"].sum())
        seconds = time.perf_counter() - self._start
        phase.train_seconds += seconds
        self._seconds_since_step += seconds
        # With gradient accumulation several batches make one step.
        if trainer.global_step > self._steps_made:
            self._step_seconds.append(self._seconds_since_step)
            self._seconds_since_step = 0.0
            self._steps_made = trainer.global_step

    def on_rank_change(self, trainer: Trainer, pl_module: LightningModule, event: RankEvent) -> None:
        if not event.undone:
            self._end(trainer)
            self._begin(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of the whole run; of the open phase only this process's tokens count."""
        seconds = sum(phase.train_seconds for phase in self.phases)
        return sum(phase.tokens for phase in self.phases) / seconds if seconds else 0.0

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ranks = [layer.rank for _, layer in lora_layers(pl_module)]
        self.phases.append(Phase(trainer.global_step, float(mean(ranks)) if ranks else 0.0))

    def _end(self, trainer: Trainer) -> None:
        phase = self.phases[-1]
        # A phase without steps (a change after the last one, a second change at once) has nothing to add up.
        if not self._step_seconds:
            return
        phase.step_seconds = median(self._step_seconds)
        self._step_seconds = []
        phase.tokens = sum(from_all(phase.tokens))
        values = {"phase/tokens_per_second": phase.tokens_per_second, "phase/mean_rank": phase.mean_rank}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)


def peak_memory_bytes() -> int:
    """The peak memory of this process so far in bytes: allocated on the GPU if there is one, otherwise resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    peak = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    if peak is not None:
        return 1024 * int(peak[1])
    # ru_maxrss survives exec, so it may be the peak of the program that ran before in this process.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
