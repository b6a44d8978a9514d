"""Stops small trainings at many moments in many ways, resumes them, and compares their ends with runs nobody stopped.

::

    python scripts/crash_matrix.py --tries 40 --seed 0    # prints the table: tried, equal, lost; and each loss

A try is drawn at random from the tables below: a schedule, an optimizer, one process or two (DDP on gloo), one of the
two checkpoint callbacks, how often it saves, and how and at which moment the run is stopped. It survives if, resumed
from what is left, it ends with the bits of a run that saved nothing and was never stopped: weights, optimizer state,
history. A run that was stopped before its first checkpoint starts again. SIGTERM and SIGINT have to leave, with
AdapterCheckpoint, a checkpoint of the step under way and the exit codes 0 and 130. A disk of 8 MB is a tmpfs, which
takes root; where none can be mounted, the program says so and draws the other ways. Each process is a fork.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes
import lightning
import schedulefree
import torch
from fsspec.implementations.local import LocalFileOpener
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

import dynrank
from dynrank.callbacks import AdapterCheckpoint, RankScheduler, ScheduleFreeMode, StepSeed
from dynrank.commands.exits import usage_errors
from dynrank.layers.base import LoRALayer
from dynrank.output.whole_file import PART
from dynrank.run.stopping import CtrlC, stoppable
from dynrank.schedules import How, Stage, anneal, constant, grow_then_shrink, halving_on_plateau, join, squeeze_at_end
from dynrank.targets import Budget, Rank
from dynrank.tasks.loader import ResumableLoader, evaluation_batches
from dynrank.triggers import At, Plateau

STEPS = 30  # 10 batches an epoch, a validation every 4
CHECKED = How(metric="loss", window=3, rewarmup_steps=3, max_regression=10.0)  # validated before and after
LEVEL = Plateau(patience=1, min_delta=0.9)  # decided at step 8
SCHEDULES: dict[str, tuple[Any, How]] = {
    "plateau, then a cut, checked": ([Stage(LEVEL, Rank(4)), Stage(At(step=19), Rank(2))], CHECKED),
    "undone, and half as far": ([Stage(At(step=9), Rank(2)), Stage(At(step=20), Rank(1))], How(max_regression=0.01)),
    "grown, then cut": (grow_then_shrink(9, 3, grow_at=0.25), How(rewarmup_steps=2)),
    "grown at random, then cut": (join([constant(6), constant(9), constant(2)], [6, 17]), How()),
    "budget by loss": ([Stage(At(step=12), Budget(share=0.5))], How(metric="loss", window=4)),
    "halving by output": (halving_on_plateau(2, LEVEL), How(metric="output", window=2)),
    "anneal": (anneal(2), How(rewarmup_steps=2)),
    "squeezed after the end, checked": (squeeze_at_end(2), How(max_regression=10.0)),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": partial(torch.optim.AdamW, lr=1e-2),
    "SGD": partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "Adafactor": partial(torch.optim.Adafactor, lr=0.1),
    "schedule-free AdamW": partial(schedulefree.AdamWScheduleFree, lr=1e-2),
    "8-bit AdamW": partial(bitsandbytes.optim.AdamW8bit, lr=1e-2, min_8bit_size=1),
}
CALLBACKS: dict[str, Any] = {"AdapterCheckpoint": AdapterCheckpoint, "ModelCheckpoint": ModelCheckpoint}
FULL = "8 MB disk, full"
WAYS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, FULL: None}
ANY, CUT, MOVE = "any time", "checkpoint half written", "checkpoint not moved"
MOMENTS = (ANY, "inside a step", "resize", "decided, not made", "validation", "after the last step", CUT, MOVE)


@dataclass(frozen=True)
class Case:
    """A run; ``callback`` is None where nothing is saved."""

    schedule: str
    optimizer: str
    processes: int
    callback: str | None = None
    every: int = 1


@dataclass(frozen=True)
class Stop:
    """How, when and in which process a run is stopped: at the ``number``-th of its moments, or ``delay`` s after."""

    way: str
    moment: str
    number: int
    delay: float
    process: int
    room: int  # bytes that a full disk still has


class Regression(lightning.LightningModule):
    """Learns a linear map; two layers with LoRA, dropout in between, a norm whose statistics move (in one process)."""

    def __init__(self, case: Case, process: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(24) if case.processes == 1 else nn.Identity()
        net = nn.Sequential(nn.Linear(12, 24), norm, nn.Dropout(0.2), nn.Linear(24, 12))
        self.net, self.case = dynrank.add_lora(net, rank=6, alpha=12), case
        self.share = process, case.processes
        x = torch.randn(80, 12, generator=torch.Generator().manual_seed(1))
        self.pairs = TensorDataset(x, x @ torch.randn(12, 12))

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


def train(case: Case, folder: Path, process: int, stop: Stop | None) -> None:
    """Make or resume the run of ``folder``, in one of its processes, and put what it comes to beside its disk."""
    disk = folder / "disk"
    tempfile.tempdir = str(disk)  # where Lightning writes a file before it moves it, in one step on one disk only
    scheduler = RankScheduler(*SCHEDULES[case.schedule])
    watches = [Watch(moment, scheduler) for moment in MOMENTS] if stop is None else []
    if stop is not None and stop.process == process:
        watches = [Watch(stop.moment, scheduler, stop.number, partial(act, stop, folder), stop.way == "SIGKILL")]
    callbacks = [ScheduleFreeMode(), scheduler, StepSeed(0), *watches]
    if case.callback is not None:
        options = {"every_n_train_steps": case.every, "save_top_k": 1, "enable_version_counter": False}
        callbacks += [CALLBACKS[case.callback](disk, filename="last", **options)]
    callbacks += [CtrlC()] if case.callback == "AdapterCheckpoint" else []
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=STEPS, callbacks=callbacks, logger=False, val_check_interval=4,
        check_val_every_n_epoch=None, num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False,
        devices=case.processes, use_distributed_sampler=False, enable_checkpointing=case.callback is not None,
        strategy="auto" if case.processes == 1 else DDPStrategy(timeout=timedelta(seconds=60)),
    )  # fmt: skip
    checkpoint = disk / "last.ckpt" if (disk / "last.ckpt").exists() else None
    module = Regression(case, process)
    with usage_errors(), stoppable(trainer, checkpoint):
        trainer.fit(module, ckpt_path=checkpoint)
    end = {"weights": module.state_dict(), "optimizer": trainer.optimizers[0].state_dict()}
    end["history"] = [(event.step, event.reason, repr(event.layers)) for event in scheduler.history]
    torch.save((end, {watch.moment: watch.passed for watch in watches}), folder / f"end{process}.pt")


def act(stop: Stop, folder: Path, step: int = -1) -> None:
    """Stop this process as ``stop`` says, or fill the disk."""
    (folder / "stopped at").write_text(str(step))
    if stop.way == FULL:
        (folder / "disk" / "filler").write_bytes(bytes(max(0, shutil.disk_usage(folder / "disk").free - stop.room)))
    else:
        os.kill(os.getpid(), WAYS[stop.way])


class Watch(lightning.Callback):
    """Counts the moments of a kind, and calls ``act`` at one of them; a half written file is cut if that ends all."""

    def __init__(
        self, moment: str, scheduler: RankScheduler, number: int = -1, act: Any = None, cuts: bool = False
    ) -> None:
        self.moment, self.scheduler, self.number, self.act, self.cuts = moment, scheduler, number, act, cuts
        self.passed, self.step = 0, 0
        if moment == "resize":
            self._put_before(LoRALayer, "set_factors", lambda *_: self._pass("resize"))
        elif moment == CUT:
            self._put_before(os, "fsync", lambda handle: self._cut(os.readlink(f"/proc/self/fd/{handle}")))
            self._put_before(LocalFileOpener, "commit", lambda file: self._cut(f"{file.temp}{PART}"))
        elif moment == MOVE:
            self._put_before(os, "replace", lambda *_: self._pass(MOVE))
            self._put_before(shutil, "move", lambda *_: self._pass(MOVE))

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.step = trainer.global_step
        if self.scheduler.driver.progress.pending:
            self._pass("decided, not made")

    def on_before_optimizer_step(self, *_: Any) -> None:
        self._pass("inside a step")

    def on_validation_batch_start(self, *_: Any) -> None:
        self._pass("validation")

    def on_train_end(self, *_: Any) -> None:
        self._pass("after the last step")

    def _pass(self, moment: str) -> None:
        if moment == self.moment:
            self.passed += 1
            if self.passed == self.number + 1:
                self.act(self.step)

    def _cut(self, name: str) -> None:
        path = Path(name)
        if name.endswith(PART):
            path = path if path.exists() else path.with_suffix("")
            if self.cuts and self.passed == self.number:
                os.truncate(path, path.stat().st_size // 3)
            self._pass(CUT)

    @staticmethod
    def _put_before(owner: Any, name: str, extra: Callable[..., None]) -> None:
        original = getattr(owner, name)

        def both(*arguments: Any) -> Any:
            extra(*arguments)
            return original(*arguments)

        setattr(owner, name, both)


def forked(work: Callable[[], None], printed: Path, environment: dict[str, str]) -> int:
    """Start a process that does ``work`` and ends as a program would; its number."""
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        os.environ.update(environment)
        for stream in (1, 2):
            os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
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


def run(case: Case, folder: Path, stop: Stop | None = None) -> list[int]:
    """Start all processes of the run of ``folder`` and wait for them; the exit codes, negative after a signal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "GROUP_RANK": "0"}
    group |= {"WORLD_SIZE": str(case.processes), "LOCAL_WORLD_SIZE": str(case.processes), "TORCHELASTIC_RUN_ID": "1"}
    children = []
    for process in range(case.processes):
        numbers = {**group, "RANK": str(process), "LOCAL_RANK": str(process)} if case.processes > 1 else {}
        work = partial(train, case, folder, process, stop)
        children.append(forked(work, folder / f"printed{process}", numbers))
    if stop is not None and stop.moment == ANY:
        time.sleep(stop.delay)
        act_on = children[stop.process]
        if stop.way == FULL:
            act(stop, folder)
        else:
            os.kill(act_on, WAYS[stop.way])
    codes: dict[int, int] = {}
    patience = time.monotonic() + 100
    while len(codes) < len(children):
        for child in children:
            if child not in codes and (ended := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = os.waitstatus_to_exitcode(ended[1])
                patience = min(patience, time.monotonic() + 20)  # then as torchrun does
            elif child not in codes and time.monotonic() > patience:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[child] for child in children]


def equal(one: Any, other: Any) -> bool:
    """Bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def ends(case: Case, folder: Path) -> list[Any]:
    """What each process came to, and how often each moment came."""
    return [torch.load(folder / f"end{process}.pt") for process in range(case.processes)]


def broken_promise(case: Case, stop: Stop, codes: list[int], folder: Path) -> str | None:
    """What is wrong with how AdapterCheckpoint let the run end, or None."""
    if case.callback != "AdapterCheckpoint" or stop.moment == ANY or (folder / "end0.pt").exists():
        return None
    saved = torch.load(folder / "disk" / "last.ckpt")["global_step"] if (folder / "disk" / "last.ckpt").exists() else -1
    if stop.way in ("SIGTERM", "SIGINT"):
        expected = [0] * case.processes
        expected[stop.process] = {"SIGTERM": 0, "SIGINT": 130}[stop.way]
        step = int((folder / "stopped at").read_text())
        return None if codes == expected and saved - step in (0, 1) else f"{stop.way} at step {step}: saved {saved}"
    return None if stop.way != FULL or codes[0] == 2 else "the full disk had another exit code than 2"


def lost(case: Case, stop: Stop, folder: Path, expected: list[Any]) -> tuple[bool, str | None]:
    """Stop the run and resume it; whether it was stopped before its end, and what was lost (None: nothing)."""
    codes = run(case, folder, stop)
    stopped, fault = not (folder / "end0.pt").exists(), broken_promise(case, stop, codes, folder)
    (folder / "disk" / "filler").unlink(missing_ok=True)
    again = run(case, folder) if stopped or any(codes) else [0]
    if fault is None and any(again):
        fault = f"the resume ended with {again}"
    if fault is None and not equal([end for end, _ in ends(case, folder)], [end for end, _ in expected]):
        fault = "it came to other bits"
    return stopped, fault and f"{fault}; first ended with {codes}"


def draw(chance: random.Random, ways: list[str]) -> tuple[Case, Stop]:
    """A case and a stop; the number of the moment is a share of all as yet."""
    case = Case(
        chance.choice([*SCHEDULES]), chance.choice([*OPTIMIZERS]), chance.choice([1, 2]), chance.choice([*CALLBACKS]),
        chance.choice([1, 3, 7]),
    )  # fmt: skip
    stop = Stop(
        chance.choice(ways), chance.choice(MOMENTS), chance.randrange(10**6), chance.uniform(0, 1),
        chance.randrange(case.processes), chance.randrange(60_000),
    )  # fmt: skip
    return case, stop


def main() -> int:
    """Print the table; 1 if a run was lost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tries", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    chance, tried, failed = random.Random(arguments.seed), Counter[str](), Counter[str]()
    references: dict[Case, tuple[float, list[Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        small = top / "small"
        small.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", small], check=False).returncode == 0
        ways = [way for way in WAYS if mounted or way != FULL]
        try:
            for at in itertools.count():
                if tried["all"] == arguments.tries:
                    break
                case, stop = draw(chance, ways)
                whole = replace(case, callback=None, every=1)
                if whole not in references:
                    folder = top / f"whole{at}"
                    (folder / "disk").mkdir(parents=True)
                    start = time.perf_counter()
                    codes = run(whole, folder)
                    assert not any(codes), (folder / "printed0").read_text()
                    references[whole] = time.perf_counter() - start, ends(whole, folder)
                seconds, expected = references[whole]
                counts = expected[0][1] | dict.fromkeys((CUT, MOVE), STEPS // case.every)
                moment = stop.moment if counts.get(stop.moment) else ANY
                number = stop.number % max(1, counts.get(moment, 1))
                stop = replace(stop, moment=moment, number=number, delay=stop.delay * seconds)
                folder = top / str(at)
                folder.mkdir()
                if stop.way == FULL:
                    (folder / "disk").symlink_to(small)
                else:
                    (folder / "disk").mkdir()
                stopped, why = lost(case, stop, folder, expected)
                for key in (*map(str, vars(case).values()), stop.way, stop.moment, "all") if stopped or why else ():
                    tried[key] += 1
                    failed[key] += why is not None
                if why is not None:
                    print(f"try {at}: {why}\n  {case}\n  {stop}", flush=True)
                    for process in range(case.processes):
                        print((folder / f"printed{process}").read_text()[-3000:], flush=True)
                for left in small.iterdir():
                    left.unlink()
        finally:
            if mounted:
                subprocess.run(["umount", small], check=True)
    print(f"{'':<32}{'tried':>7}{'equal':>7}{'lost':>6}")
    for key in sorted(tried, key=lambda key: (key == "all", key)):
        print(f"{key:<32}{tried[key]:>7}{tried[key] - failed[key]:>7}{failed[key]:>6}")
    return bool(failed["all"])


if __name__ == "__main__":
    sys.exit(main())
