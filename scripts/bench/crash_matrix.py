"""Stops small runs at random moments in many ways, resumes them, and compares their ends with runs that never stopped.

::

    python scripts/bench/crash_matrix.py --tries 40 --seed 0    # prints what was lost, and a table: tried, equal, lost
    python scripts/bench/crash_matrix.py --schedules auto "early budget"

A try draws at random a run from the tables below, and how, when and in which process it is stopped. It survives if,
resumed from its last checkpoint, it ends with the bits of a run that saved nothing and was never stopped: weights,
optimizer state, history. A run that was stopped before its first checkpoint starts again. In training, SIGTERM and
SIGINT have to leave a checkpoint of the step under way and the exit codes 0 and 130.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import bitsandbytes
import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

import dynrank
from dynrank.app.runs.overrides import usage_errors
from dynrank.app.runs.trainer import STOP_SIGNALS, stoppable
from dynrank.app.tasks.loader import ResumableLoader, evaluation_batches
from dynrank.callbacks import AdapterCheckpoint, RankScheduler, StepSeed
from dynrank.layers.lora_layer import LoRALayer
from dynrank.output.whole_file import PART
from dynrank.schedules import How, Stage, anneal, auto, early_budget
from dynrank.targets import GrowTo, Rank
from dynrank.triggers import At, Plateau

# An epoch has 10 batches, and a validation comes every 4 steps.
STEPS = 30
# Validated before and after.
CHECKED = How(lr_factor=2.0, max_regression=10.0)
WATCHED = How(lr_factor="sqrt")
# Decided at step 8.
LEVEL = Plateau(patience=1, min_delta=0.9)
SCHEDULES: dict[str, list[Stage]] = {
    "plateau and cut, checked": [Stage(LEVEL, Rank(4), how=CHECKED), Stage(At(step=19), Rank(2), how=CHECKED)],
    "undone twice": [
        Stage(At(step=step), Rank(rank), how=How(max_regression=0.01)) for step, rank in ((9, 2), (20, 1))
    ],
    "grown at random, then cut": [
        Stage(At(step=6), GrowTo(9), how=How(lr_factor=2.0)),
        Stage(At(step=17), Rank(2), how=How(lr_factor=2.0)),
    ],
    "early budget": early_budget(3, how=WATCHED),
    "anneal": anneal(2, shared=False, how=How(lr_factor=2.0)),
    "auto": auto(0.5, share=0.5, at=0.4, how=WATCHED),
    "cut at the end, checked": [Stage(At(fraction=1.0), Rank(2), how=How(max_regression=10.0))],
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": partial(torch.optim.AdamW, lr=1e-2),
    "SGD": partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
    "Adafactor": partial(torch.optim.Adafactor, lr=0.1),
    "8-bit AdamW": partial(bitsandbytes.optim.AdamW8bit, lr=1e-2, min_8bit_size=1),
}
WAYS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
ANY = "any time"
CUT = "checkpoint half written"
MOVE = "checkpoint not moved"
MOMENTS = (ANY, "inside a step", "resize", "validation", "after the last step", CUT, MOVE)


@dataclass(frozen=True)
class Case:
    """A run: names of the tables above, and optimizer steps between checkpoints; None saves nothing."""

    schedule: str
    optimizer: str
    processes: int
    every: int | None = None


@dataclass(frozen=True)
class Stop:
    """How, when and where a run is stopped: at a moment of a kind, by its number, or after some seconds."""

    way: str
    moment: str
    number: int
    delay: float
    process: int


class Regression(lightning.LightningModule):
    """Learns a linear map; two layers with LoRA, dropout in between, a norm whose statistics move (in one process)."""

    def __init__(self, case: Case, process: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.case = case
        self.share = (process, case.processes)
        x = torch.randn(80, 12)
        self.pairs = TensorDataset(x, x @ torch.randn(12, 12))
        norm = nn.BatchNorm1d(24) if case.processes == 1 else nn.Identity()
        net = nn.Sequential(nn.Linear(12, 24), norm, nn.Dropout(0.2), nn.Linear(24, 12))
        self.net = dynrank.add_lora(net, rank=6, alpha=12)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.case.optimizer]([p for p in self.parameters() if p.requires_grad])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * STEPS)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def train_dataloader(self) -> ResumableLoader:
        return ResumableLoader(self.pairs, [1] * 80, 8 // self.share[1], 3, default_collate, share=self.share)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.pairs, batch_sampler=evaluation_batches(80, 40 // self.share[1], self.share))


def train(case: Case, folder: Path, process: int, watches: list[lightning.Callback]) -> dict[str, Any]:
    """Make the run whose checkpoints are in ``folder``, or go on with it; what it comes to in this ``process``."""
    scheduler = RankScheduler(deepcopy(SCHEDULES[case.schedule]))
    callbacks = [scheduler, StepSeed(0), *watches]
    saver = AdapterCheckpoint(
        folder, filename="last", every_n_train_steps=case.every, save_top_k=1, enable_version_counter=False
    )
    saver.stop_signals = STOP_SIGNALS
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=STEPS, logger=False, val_check_interval=4, check_val_every_n_epoch=None,
        callbacks=[*callbacks, saver] if case.every else callbacks, enable_checkpointing=case.every is not None,
        num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False,
        devices=case.processes, use_distributed_sampler=False,
        strategy="auto" if case.processes == 1 else DDPStrategy(timeout=timedelta(seconds=60)),
    )  # fmt: skip
    checkpoint = folder / "last.ckpt" if (folder / "last.ckpt").exists() else None
    module = Regression(case, process)
    with usage_errors(), stoppable(trainer, folder):
        trainer.fit(module, ckpt_path=checkpoint)
    history = [(event.step, event.reason, repr(event.layers)) for event in scheduler.history]
    return {"weights": module.state_dict(), "optimizer": trainer.optimizers[0].state_dict(), "history": history}


def act(stop: Stop, folder: Path, process: int, step: int = -1, written: str | None = None) -> None:
    """Stop the process of this number; what a killed one was writing is cut."""
    (folder / "step").write_text(str(step))
    if written is not None and stop.way == "SIGKILL":
        os.truncate(written, os.stat(written).st_size // 3)
    os.kill(process, WAYS[stop.way])


class Watch(lightning.Callback):
    """Counts the moments of a kind, and calls ``act`` at one of them."""

    def __init__(self, moment: str, number: int = -1, act: Callable[[int, str | None], None] | None = None) -> None:
        self.moment = moment
        self.number = number
        self.act = act
        self.passed = 0
        self.step = 0
        if moment == "resize":
            _put_before(LoRALayer, "set_factors", lambda *_: self._pass("resize"))
        elif moment == CUT:
            _put_before(os, "fsync", lambda handle: self._write(os.readlink(f"/proc/self/fd/{handle}")))
        elif moment == MOVE:
            _put_before(os, "replace", lambda *_: self._pass(MOVE))

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.step = trainer.global_step

    def on_before_optimizer_step(self, *_: Any) -> None:
        self._pass("inside a step")

    def on_validation_batch_start(self, *_: Any) -> None:
        self._pass("validation")

    def on_train_end(self, *_: Any) -> None:
        self._pass("after the last step")

    def _write(self, name: str) -> None:
        if name.endswith(PART):
            self._pass(CUT, name)

    def _pass(self, moment: str, written: str | None = None) -> None:
        if moment == self.moment:
            self.passed += 1
            if self.passed == self.number + 1 and self.act is not None:
                self.act(self.step, written)


def _put_before(owner: Any, name: str, extra: Callable[..., None]) -> None:
    original = getattr(owner, name)

    def both(*arguments: Any) -> Any:
        extra(*arguments)
        return original(*arguments)

    setattr(owner, name, both)


def one_process(case: Case, folder: Path, process: int, port: int, stop: Stop | None) -> None:
    """Train, stop if this is the process, and write what it comes to, with the number of each kind of moments."""
    for stream in (1, 2):
        os.dup2(os.open(folder / f"printed{process}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    # After a fork one thread has to make torch's pool of threads again; two that do it at once abort the process.
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # torchrun does the same.
    if case.processes > 1:
        count = str(case.processes)
        number = str(process)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="1", GROUP_RANK="0")
        os.environ.update(WORLD_SIZE=count, LOCAL_WORLD_SIZE=count, RANK=number, LOCAL_RANK=number)
    watches = [Watch(moment) for moment in MOMENTS] if stop is None else []
    if stop is not None and stop.process == process:
        here = os.getpid()
        watches = [Watch(stop.moment, stop.number, lambda step, written: act(stop, folder, here, step, written))]
    end = train(case, folder / "saved", process, [*watches])
    torch.save((end, {watch.moment: watch.passed for watch in watches}), folder / f"end{process}.pt")


def run(case: Case, folder: Path, stop: Stop | None = None) -> list[int]:
    """Start all processes of a run and wait for them; the exit codes, negative after a signal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    numbers = range(case.processes)
    children = [fork.Process(target=one_process, args=(case, folder, number, port, stop)) for number in numbers]
    for child in children:
        child.start()
    if stop is not None and stop.moment == ANY:
        time.sleep(stop.delay)
        act(stop, folder, children[stop.process].pid or 0)
    wait([child.sentinel for child in children], 120)
    for child in children:
        child.join(20)
        # torchrun does the same.
        if child.exitcode is None:
            print(f"left waiting: a process of {case}, {stop}", flush=True)
            child.kill()
            child.join()
    return [child.exitcode or 0 for child in children]


def ends(case: Case, folder: Path) -> list[Any]:
    """What each process came to, and how often each moment came."""
    return [torch.load(folder / f"end{process}.pt") for process in range(case.processes)]


def equal(one: Any, other: Any) -> bool:
    """Bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def broken_promise(case: Case, stop: Stop, codes: list[int], folder: Path) -> str | None:
    """What is wrong with how a run ended before its time; None: nothing."""
    if stop.moment == ANY or stop.way == "SIGKILL":
        return None
    file = folder / "saved" / "last.ckpt"
    step = int((folder / "step").read_text())
    saved = torch.load(file)["global_step"] if file.exists() else None
    expected = [130 if stop.way == "SIGINT" and process == stop.process else 0 for process in range(case.processes)]
    return None if codes == expected and saved in (step, step + 1) else f"at step {step} it saved {saved}"


def outcome(case: Case, stop: Stop, folder: Path, expected: list[Any]) -> tuple[bool, str | None]:
    """Stop a run and resume it; whether it was stopped before its end, and what was lost (None: nothing)."""
    codes = run(case, folder, stop)
    stopped = not (folder / "end0.pt").exists()
    fault = broken_promise(case, stop, codes, folder) if stopped else None
    again = run(case, folder) if any(codes) or stopped else codes
    if fault is None and any(again):
        fault = "the resume failed"
    if fault is None and not equal([end for end, _ in ends(case, folder)], [end for end, _ in expected]):
        fault = "it came to other bits"
    return stopped, fault and f"{fault}; exit codes {codes}, then {again}"


def draw(chance: random.Random, schedules: list[str]) -> tuple[Case, Stop]:
    """A case, and a stop whose number and delay are not limited to the run yet."""
    case = Case(chance.choice(schedules), chance.choice([*OPTIMIZERS]), chance.choice([1, 2]), chance.choice([1, 3, 7]))
    way = chance.choice([*WAYS])
    moment = chance.choice(MOMENTS)
    return case, Stop(way, moment, chance.randrange(10**6), chance.random(), chance.randrange(case.processes))


class Matrix:
    """Tries, and what has come of them."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.tried = Counter[str]()
        self.lost = Counter[str]()
        self.wholes: dict[Case, tuple[float, list[Any]]] = {}

    def whole(self, case: Case) -> tuple[float, list[Any]]:
        """Seconds and ends of the run without stops and checkpoints."""
        if case not in self.wholes:
            folder = self._folder()
            start = time.perf_counter()
            codes = run(case, folder)
            assert not any(codes), (folder / "printed0").read_text()
            self.wholes[case] = time.perf_counter() - start, ends(case, folder)
        return self.wholes[case]

    def one_try(self, case: Case, stop: Stop) -> None:
        """Stop and resume a run; it counts if it was stopped, or is lost."""
        seconds, expected = self.whole(replace(case, every=None))
        counts = expected[0][1] | dict.fromkeys((CUT, MOVE), STEPS // (case.every or STEPS))
        moment = stop.moment if counts[stop.moment] else ANY
        stop = replace(stop, moment=moment, number=stop.number % max(1, counts[moment]), delay=stop.delay * seconds)
        folder = self._folder()
        stopped, fault = outcome(case, stop, folder, expected)
        processes = f"processes: {case.processes}"
        saved = f"steps between checkpoints: {case.every}"
        keys = (stop.way, stop.moment, case.schedule, case.optimizer, processes, saved, "all")
        self.tried.update(keys if stopped or fault else ())
        self.lost.update(keys if fault else ())
        if fault:
            printed = [(folder / f"printed{process}").read_text()[-3000:] for process in range(case.processes)]
            print(f"lost: {fault}\n  {case}\n  {stop}", *printed, sep="\n", flush=True)

    def _folder(self) -> Path:
        folder = Path(tempfile.mkdtemp(dir=self.top))
        (folder / "saved").mkdir()
        return folder


def main() -> int:
    """Print the table; 1 if a run was lost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tries", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=[*SCHEDULES])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as top:
        matrix = Matrix(Path(top))
        while matrix.tried["all"] < arguments.tries:
            matrix.one_try(*draw(chance, arguments.schedules))
    print(f"{'':<32}{'tried':>7}{'equal':>7}{'lost':>6}")
    rows = sorted(matrix.tried.items(), key=lambda row: (row[0] == "all", row[0]))
    for key, tried in rows:
        print(f"{key:<32}{tried:>7}{tried - matrix.lost[key]:>7}{matrix.lost[key]:>6}")
    return bool(matrix.lost)


if __name__ == "__main__":
    sys.exit(main())
