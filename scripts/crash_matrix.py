"""Kills a small training with SIGKILL at many moments, resumes it, and compares the end with a run that nobody stopped.

::

    python scripts/crash_matrix.py --tries 40 --seed 0    # prints the table: tried, survived, lost, by moment

A run survives if, resumed from what the kill left, it ends with the same bits: weights, optimizer state, history. One
killed before its first checkpoint starts again. Each run is a process of its own, and so is each resume. Those that are
to be killed at a certain moment stop there by themselves and say so; the others are killed at a random time.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

import dynrank
from dynrank.callbacks import AdapterCheckpoint, RankScheduler, StepSeed
from dynrank.layers.base import LoRALayer
from dynrank.output import whole_file
from dynrank.output.whole_file import PART
from dynrank.schedules import How, Stage
from dynrank.targets import Rank
from dynrank.tasks.loader import ResumableLoader
from dynrank.triggers import At, Plateau

STEPS = 30  # 10 batches an epoch, a validation every 4
MOMENTS = ("any time", "resize", "decided, not made", "checkpoint half written", "checkpoint not moved", "validation")


class Regression(lightning.LightningModule):
    """Learns a linear map; two layers with LoRA, dropout in between, a norm whose statistics move."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.Dropout(0.2), nn.Linear(24, 6))
        self.net = dynrank.add_lora(net, rank=6, alpha=12)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val/loss", nn.functional.mse_loss(self.net(x), y))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS), "interval": "step"}
        ]


def data() -> tuple[ResumableLoader, DataLoader[Any]]:
    """Training batches whose loader keeps its place, and two validation batches."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(80, 12, generator=generator)
    pairs = TensorDataset(x, x @ torch.randn(12, 6, generator=generator))
    return ResumableLoader(pairs, [1] * 80, 8, 3, default_collate), DataLoader(pairs, batch_size=40)


def train(folder: Path, moment: str | None = None, number: int = 0, act: Callable[[], None] | None = None) -> None:
    """Make or resume the run of ``folder``, and put what it comes to into ``folder / "end.pt"``.

    Args:
        folder: holds last.ckpt if the run is to be resumed.
        moment: one of ``MOMENTS`` at which ``act`` is called.
        number: how many of them pass before.
        act: what happens there.
    """
    how = How(metric="loss", window=3, rewarmup_steps=3, max_regression=10.0)  # validated before and after
    stages = [
        Stage(Plateau(patience=1, min_delta=0.9), Rank(4)),  # decided at step 8, measured until 11
        Stage(At(step=19), Rank(2)),
    ]
    scheduler = RankScheduler(stages, how)
    saving = AdapterCheckpoint(
        folder, filename="last", every_n_train_steps=1, save_top_k=1, enable_version_counter=False
    )
    callbacks = [StepSeed(0), scheduler, *([Watch(moment, number, act, scheduler)] if moment and act else []), saving]
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=STEPS, callbacks=callbacks, logger=False, val_check_interval=4,
        check_val_every_n_epoch=None, num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    checkpoint = folder / "last.ckpt"
    module = Regression()
    trainer.fit(module, *data(), ckpt_path=checkpoint if checkpoint.exists() else None)
    state: dict[int, Any] = trainer.optimizers[0].state_dict()["state"]
    history = [(event.step, event.reason, repr(event.layers)) for event in scheduler.history]
    torch.save({"weights": module.state_dict(), "state": state, "history": history}, folder / "end.pt")


class Watch(lightning.Callback):
    """Calls ``act`` once, at the ``number``-th of a kind of moments."""

    def __init__(self, moment: str, number: int, act: Callable[[], None], scheduler: RankScheduler) -> None:
        self.moment, self.left, self.act, self.scheduler = moment, number, act, scheduler
        if moment == "resize":
            self._put_before(LoRALayer, "set_factors", lambda *_: self.pass_by())
        elif moment == "checkpoint not moved":
            self._put_before(whole_file.os, "replace", lambda *_: self.pass_by())
        elif moment == "checkpoint half written":
            self._put_before(whole_file.os, "fsync", self._cut)

    def pass_by(self) -> None:
        self.left -= 1
        if self.left == -1:
            self.act()

    def on_train_batch_end(self, *_: Any) -> None:
        if self.moment == "step" or (self.moment == "decided, not made" and self.scheduler.driver.progress.pending):
            self.pass_by()

    def on_before_optimizer_step(self, *_: Any) -> None:
        if self.moment == "inside a step":
            self.pass_by()

    def on_validation_batch_start(self, *_: Any) -> None:
        if self.moment == "validation":
            self.pass_by()

    def _cut(self, handle: int) -> None:
        name = os.readlink(f"/proc/self/fd/{handle}")
        if name.endswith(PART):
            if self.left == 0:
                os.ftruncate(handle, os.fstat(handle).st_size // 3)
            self.pass_by()

    @staticmethod
    def _put_before(owner: Any, name: str, extra: Callable[..., None]) -> None:
        original = getattr(owner, name)

        def both(*arguments: Any) -> Any:
            extra(*arguments)
            return original(*arguments)

        setattr(owner, name, both)


def forked(work: Callable[[], None]) -> int:
    """Start a process that does ``work`` and ends as a program would; its number."""
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        warnings.simplefilter("ignore")
        work()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def killed(folder: Path, moment: str, number: int, delay: float) -> bool:
    """Start the run of ``folder`` and kill it; whether it was still running."""
    reached, announce = os.pipe()

    def stop_there() -> None:
        os.write(announce, b".")
        time.sleep(600)  # until the signal comes

    def work() -> None:
        os.close(reached)  # the parent alone reads
        train(folder, None if moment == "any time" else moment, number, stop_there)

    child = forked(work)
    os.close(announce)
    if moment == "any time":
        time.sleep(delay)
    else:
        os.read(reached, 1)  # or the end, if the run has ended without it
    os.kill(child, signal.SIGKILL)
    os.close(reached)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def equal(one: Any, other: Any) -> bool:
    """Bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return bool(one == other)


def main() -> int:
    """Print the table; 1 if a run was lost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tries", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    chance = random.Random(arguments.seed)
    counts = {moment: {"tried": 0, "survived": 0, "lost": 0} for moment in MOMENTS}
    with tempfile.TemporaryDirectory() as top:
        whole = Path(top, "whole")
        start = time.perf_counter()
        os.waitpid(forked(lambda: train(whole)), 0)
        seconds, expected = time.perf_counter() - start, torch.load(whole / "end.pt")
        most = {"resize": 4, "decided, not made": 2, "validation": 16}  # how often they come
        for at in range(arguments.tries):
            moment, folder = MOMENTS[at % len(MOMENTS)], Path(top, str(at))
            number, delay = chance.randrange(most.get(moment, STEPS)), chance.uniform(0, 0.9 * seconds)
            if not killed(folder, moment, number, delay):
                print(f"not killed: it had ended before {moment}, number {number}, {delay:.2f} s")
                continue
            ended = os.waitstatus_to_exitcode(os.waitpid(forked(lambda: train(folder)), 0)[1])  # noqa: B023
            survived = ended == 0 and equal(torch.load(folder / "end.pt"), expected)
            counts[moment]["tried"] += 1
            counts[moment]["survived" if survived else "lost"] += 1
            if not survived:
                print(f"lost: {moment}, number {number}, after {delay:.2f} s; resume ended with {ended}")
    print(f"{'killed at':<26}{'tried':>7}{'survived':>10}{'lost':>6}")
    sums = {key: sum(row[key] for row in counts.values()) for key in ("tried", "survived", "lost")}
    for moment, row in {**counts, "all": sums}.items():
        print(f"{moment:<26}{row['tried']:>7}{row['survived']:>10}{row['lost']:>6}")
    return bool(sums["lost"])


if __name__ == "__main__":
    sys.exit(main())
