"""Measuring a run: tokens and seconds of training between changes of rank, and the peak memory."""

import re
import resource
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dynrank.distributed.processes import from_all
from dynrank.driver.event import RankEvent
from dynrank.errors import NotNegative, Steps, read_as
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

    first_step: Steps = 0
    mean_rank: NotNegative = 0.0
    tokens: Steps = 0
    train_seconds: NotNegative = 0.0
    step_seconds: NotNegative = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.train_seconds if self.train_seconds else 0.0


class RunMeter(Callback):
    """Measures the tokens and the seconds of training, in each phase between changes of rank.

    When a phase is over, loggers get its ``phase/tokens_per_second`` and ``phase/mean_rank``. Batches are mappings with
    an ``attention_mask``. A resumed run continues the phases of its checkpoint. A checkpoint counts the tokens of the
    open phase as those of process 0 times the number of processes.

    Attributes:
        phases: the phases of this run; the last one is open until training ends.
    """

    def __init__(self) -> None:
        self.phases = [Phase()]
        # Phases of the checkpoint from which the run is resumed.
        self._before: list[Phase] = []
        # Tokens of the open phase from before a resume, of all processes.
        self._earlier_tokens = 0
        # Over how many processes the other tokens of the last phase are still to be summed up; 0: it is over.
        self._processes = 0
        # Time at which the batch began, and seconds of batches since the last optimizer step.
        self._start = self._seconds_since_step = 0.0
        # Seconds of each optimizer step of the open phase, since the start or the resume.
        self._step_seconds: list[float] = []
        self._steps_made = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.phases, self._before = self._before or [_phase(trainer, pl_module)], []
        self._processes = trainer.world_size
        self._earlier_tokens, self.phases[-1].tokens = self.phases[-1].tokens, 0
        self._step_seconds, self._seconds_since_step, self._steps_made = [], 0.0, trainer.global_step
        if torch.cuda.is_available():
            # A sweep makes several runs in one process.
            torch.cuda.reset_peak_memory_stats()

    def state_dict(self) -> dict[str, Any]:
        phase = self._open_phase()
        if self._processes:
            phase = replace(phase, tokens=self._earlier_tokens + phase.tokens * self._processes)
        return {"phases": [asdict(phase) for phase in (*self.phases[:-1], phase)]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = read_as(list[Phase], state_dict["phases"], "ckpt_path")

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
            self._seconds_since_step, self._steps_made = 0.0, trainer.global_step

    def on_rank_change(self, trainer: Trainer, pl_module: LightningModule, event: RankEvent) -> None:
        if not event.undone:
            self._close(trainer)
            self.phases.append(_phase(trainer, pl_module))
            self._processes, self._earlier_tokens = trainer.world_size, 0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close(trainer)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of the whole run; of the open phase only this process's tokens count."""
        seconds = sum(phase.train_seconds for phase in self.phases)
        return sum(phase.tokens for phase in self.phases) / seconds if seconds else 0.0

    def _open_phase(self) -> Phase:
        """The open phase with the median seconds of its steps so far."""
        phase = self.phases[-1]
        return replace(phase, step_seconds=median(self._step_seconds)) if self._step_seconds else phase

    def _close(self, trainer: Trainer) -> None:
        # A change after the last step may come after on_train_end, which has closed the phase.
        if not self._processes:
            return
        phase = self.phases[-1] = self._open_phase()
        phase.tokens = self._earlier_tokens + sum(from_all(phase.tokens))
        self._step_seconds, self._processes = [], 0
        values = {"phase/tokens_per_second": phase.tokens_per_second, "phase/mean_rank": phase.mean_rank}
        if phase.train_seconds:
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)


def _phase(trainer: Trainer, pl_module: LightningModule) -> Phase:
    ranks = [layer.rank for _, layer in lora_layers(pl_module)]
    return Phase(trainer.global_step, float(mean(ranks)) if ranks else 0.0)


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
