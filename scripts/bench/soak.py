"""Does a long run whose ranks go down and up, again and again, keep its memory and its file handles level?

The run trains MiniLM on medical_terms, with checkpoints and two loggers. Every --every steps the rank of all layers
changes: 32, 16, 8, 16, 32 and so on. Every 10 steps the program reads the resident memory and the number of open file
handles. A line is fitted to the mean memory of whole rounds of four changes. The first quarter of the rounds (at least
one) is warm-up. The program prints a table and a verdict, and exits with 1 if memory or handles grow.
Run: .venv/bin/python scripts/bench/soak.py [--minutes 30] [--every 50]
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from dynrank import compose, lora_layers
from dynrank.app.runs.job import build
from dynrank.app.runs.run_meter import RunMeter
from dynrank.app.runs.trainer import quiet_training
from dynrank.callbacks import AdapterCheckpoint, RankMonitor, RankScheduler
from dynrank.schedules import Stage
from dynrank.targets import GrowTo, Rank
from dynrank.triggers import At

ROUND = (Rank(16), Rank(8), GrowTo(16), GrowTo(32))
MIB = 2**20
PAGE = os.sysconf("SC_PAGE_SIZE")
# Steps in a second that the schedule plans for.
FASTEST = 40


@dataclass(frozen=True)
class Sample:
    """The process at one moment."""

    step: int
    minutes: float
    rank: int
    # Resident memory, MiB.
    memory: float
    handles: int


class Sampler(Callback):
    """Reads the process every 10 steps."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step % 10 == 0:
            rank = next(layer.rank for _, layer in lora_layers(pl_module))
            minutes = (time.perf_counter() - self._start) / 60
            self.samples.append(Sample(trainer.global_step, minutes, rank, resident() / MIB, open_handles()))


def resident() -> int:
    """Bytes of resident memory now, after a collection of garbage."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE


def open_handles() -> int:
    """File descriptors that are open (without the one that this takes)."""
    return len(os.listdir("/proc/self/fd")) - 1


def slope(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Least-squares slope of y over x and its standard error, by independent residuals; needs three points."""
    count = len(x)
    mean_x = sum(x) / len(x)
    mean_y = sum(y) / len(y)
    spread = sum((v - mean_x) ** 2 for v in x)
    rate = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    rest = sum((b - mean_y - rate * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    return rate, (rest / (count - 2) / spread) ** 0.5


def soak(overrides: Sequence[str], *, minutes: float, steps: int | None, every: int, folder: Path) -> list[Sample]:
    """Train, changing ranks every so many steps, for so long; returns what was read."""
    quiet_training()
    last = steps or int(minutes * 60 * FASTEST)
    stages = [Stage(At(step=at), ROUND[i % len(ROUND)]) for i, at in enumerate(range(every, last, every))]
    config = compose(["schedule=fixed", "task.batch_size=8", "plots=false", *overrides])
    job = build(config)
    sampler = Sampler()
    callbacks = [
        RankScheduler(stages),
        RankMonitor(folder / "history.csv", "model"),
        RunMeter(),
        sampler,
        AdapterCheckpoint(
            folder / "checkpoints", every_n_train_steps=every, save_top_k=1, enable_version_counter=False
        ),
    ]
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=last,
        max_time=None if steps else {"seconds": minutes * 60},
        val_check_interval=4 * every,
        check_val_every_n_epoch=None,
        limit_val_batches=2,
        callbacks=callbacks,
        logger=[CSVLogger(str(folder), name="csv"), TensorBoardLogger(str(folder), name="tensorboard")],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # The schedule is longer than any run.
    warnings.filterwarnings("ignore", "training ended before stage")
    # One process shards nothing.
    warnings.filterwarnings("ignore", ".*WeightAveraging doesn't support sharding")
    # A change prints a table.
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        trainer.fit(job.module, job.task)
    return sampler.samples


def verdict(samples: Sequence[Sample], every: int) -> tuple[str, bool]:
    """What the samples say, and whether memory and handles are level."""
    rounds: dict[int, list[Sample]] = {}
    for sample in samples:
        rounds.setdefault((sample.step - 1) // (every * len(ROUND)), []).append(sample)
    # The last round may be cut short.
    whole = [rounds[key] for key in sorted(rounds)][:-1]
    warm = whole[max(1, len(whole) // 4) :]
    if len(warm) < 3:
        return f"no verdict: {len(warm)} rounds after warm-up, 3 are needed", False
    x = [sum(s.minutes for s in r) / len(r) for r in warm]
    y = [sum(s.memory for s in r) / len(r) for r in warm]
    rate, error = slope(x, y)
    handles = [max(s.handles for s in r) for r in warm]
    level = bool(rate <= 2 * error and handles[-1] <= handles[0])
    text = (
        f"memory: {samples[0].memory:.0f} MiB at the start, {y[0]:.0f} after warm-up, {y[-1]:.0f} at the end; "
        f"slope {rate:+.3f} MiB a minute, standard error {error:.3f}, over {len(warm)} rounds\n"
        f"file handles: {handles[0]} after warm-up, {handles[-1]} at the end\n"
        f"{'level' if level else 'NOT LEVEL'}"
    )
    return text, level


def table(samples: Sequence[Sample]) -> str:
    """About 12 rows, evenly spread."""
    shown = samples[:: max(1, len(samples) // 12)]
    rows = ["  step  minutes  rank  memory MiB  handles"]
    rows += [f"{s.step:6d}  {s.minutes:7.2f}  {s.rank:4d}  {s.memory:10.1f}  {s.handles:7d}" for s in shown]
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--steps", type=int, default=None, help="train for so many steps instead")
    parser.add_argument("--every", type=int, default=50, help="steps between changes of rank")
    parser.add_argument("overrides", nargs="*", help="of the run's configuration, as for dynrank-train")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        samples = soak(
            options.overrides, minutes=options.minutes, steps=options.steps, every=options.every, folder=Path(folder)
        )
    print(table(samples))
    text, level = verdict(samples, options.every)
    print(text)
    return 0 if level else 1


if __name__ == "__main__":
    sys.exit(main())
