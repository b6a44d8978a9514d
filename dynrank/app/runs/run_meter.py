"""Measuring a run: tokens and seconds of training, and the peak memory."""

import re
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dynrank.distributed.processes import from_all


class RunMeter(Callback):
    """Counts the tokens and the seconds of training; a resumed run counts only what it trains itself.

    Lightning's ThroughputMonitor logs seven numbers a step, and a row for each batch of a validation or a test. Batches
    are mappings with an ``attention_mask``.

    Attributes:
        tokens: input tokens without padding: of this process, and once training is over of all processes.
        seconds: of the batches of training, without validations.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self._start = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A sweep makes several runs in one process.
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        # Only Linux can forget a peak, and not every container lets it.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Reading the sum waits for the device, so the clock is read after it.
        self.tokens += int(batch["attention_mask"].sum())
        self.seconds += time.perf_counter() - self._start

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tokens = sum(from_all(self.tokens))


def peak_memory_bytes() -> int:
    """The peak memory of this process in bytes: allocated on the GPU if there is one, otherwise resident.

    It is that since the training began, where the system can forget an earlier one.
    """
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    peak = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    if peak is not None:
        return 1024 * int(peak[1])
    # ru_maxrss survives exec, so it may be the peak of the program that ran before in this process.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
