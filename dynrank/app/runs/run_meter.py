"""Measuring a run: tokens and seconds of training, and the peak memory."""

import re
import resource
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dynrank.distributed.processes import from_all
from dynrank.driver.event import RankEvent


class RunMeter(Callback):
    """Measures the tokens and the seconds of training; a resumed run measures only what it trains itself.

    Batches are mappings with an ``attention_mask``.

    Attributes:
        tokens: input tokens without padding: of this process, and once training is over of all processes.
        train_seconds: seconds in training batches, without validation.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.train_seconds = 0.0
        # Seconds of each optimizer step, with all of its batches, at the present ranks.
        self._step_seconds: list[float] = []
        self._ranks_are_new = False
        # Time at which the batch began, and seconds of batches since the last optimizer step.
        self._start = 0.0
        self._seconds_since_step = 0.0
        self._steps_made = 0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.train_seconds if self.train_seconds else 0.0

    @property
    def step_seconds(self) -> float | None:
        """Median seconds of an optimizer step at the last ranks that were trained; None without a step."""
        return median(self._step_seconds) if self._step_seconds else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps_made = trainer.global_step
        if torch.cuda.is_available():
            # A sweep makes several runs in one process.
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # A change in the last step leaves the steps before it.
        if self._ranks_are_new:
            self._step_seconds = []
            self._ranks_are_new = False
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Reading the sum waits for the device, so the clock is read after it.
        self.tokens += int(batch["attention_mask"].sum())
        seconds = time.perf_counter() - self._start
        self.train_seconds += seconds
        self._seconds_since_step += seconds
        # With gradient accumulation several batches make one step.
        if trainer.global_step > self._steps_made:
            self._step_seconds.append(self._seconds_since_step)
            self._seconds_since_step = 0.0
            self._steps_made = trainer.global_step

    def on_rank_change(self, trainer: Trainer, pl_module: LightningModule, event: RankEvent) -> None:
        self._ranks_are_new = self._ranks_are_new or not event.undone

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tokens = sum(from_all(self.tokens))


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
