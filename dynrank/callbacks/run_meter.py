"""Measuring a run: seconds of training, tokens, and the largest amount of memory it held."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dynrank.processes import from_all


class RunMeter(Callback):
    """Counts the tokens and the seconds of the training batches.

    Attributes:
        tokens: input tokens without padding, of this process, after training of all.
        train_seconds: between the start and the end of training batches; validation is left out.
    """

    def __init__(self) -> None:
        self.tokens, self.train_seconds, self._start = 0, 0.0, 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.train_seconds += time.perf_counter() - self._start
        self.tokens += int(batch["attention_mask"].sum())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tokens = sum(from_all(self.tokens))

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.train_seconds if self.train_seconds else 0.0


def peak_memory_bytes() -> int:
    """The most memory the process has held: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
