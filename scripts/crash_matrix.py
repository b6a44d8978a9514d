"""Stops small runs at many moments in many ways, resumes them, and compares their ends with runs that never stopped.

::

    python scripts/crash_matrix.py --tries 40 --seed 0    # prints what was lost, and a table: tried, equal, lost
    python scripts/crash_matrix.py --schedules auto "early budget"

A try draws at random a run (``crash_runs.py`` has the tables), and how, when and in which process it is stopped. It
survives if, resumed from its last checkpoint, it ends with the bits of a run that saved nothing and was never stopped:
weights, optimizer state, history. A run that was stopped before its first checkpoint starts again. SIGTERM and SIGINT
have to leave, with AdapterCheckpoint, a checkpoint of the step under way and the exit codes 0 and 130. The full disk is
a tmpfs of 8 MB that is filled at the moment. To mount it takes root; without root only the other ways are drawn.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import lightning
import torch
from crash_runs import CALLBACKS, OPTIMIZERS, SCHEDULES, STEPS, Case, train
from fsspec.implementations.local import LocalFileOpener

from dynrank.callbacks import RankScheduler
from dynrank.layers.base import LoRALayer
from dynrank.output.whole_file import PART

FULL = "8 MB disk, full"
WAYS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, FULL: None}
ANY, CUT, MOVE = "any time", "checkpoint half written", "checkpoint not moved"
MOMENTS = (ANY, "inside a step", "resize", "decided, not made", "validation", "after the last step", CUT, MOVE)


@dataclass(frozen=True)
class Stop:
    """How, when and where a run is stopped: at a moment of a kind, by its number, or after some seconds."""

    way: str
    moment: str
    number: int
    delay: float
    process: int
    # Bytes that are left on a full disk.
    room: int


def act(stop: Stop, folder: Path, process: int, step: int = -1, written: str | None = None) -> None:
    """Stop the process of this number, or fill the disk; what a killed one was writing is cut."""
    (folder / "step").write_text(str(step))
    if stop.way == FULL:
        # The run may be writing at the same time.
        with suppress(OSError):
            (folder / "disk" / "filler").write_bytes(bytes(max(0, shutil.disk_usage(folder / "disk").free - stop.room)))
        return
    if written is not None and stop.way == "SIGKILL":
        os.truncate(written, os.stat(written).st_size // 3)
    os.kill(process, WAYS[stop.way])  # type: ignore[arg-type]


class Watch(lightning.Callback):
    """Counts the moments of a kind, and calls ``act`` at one of them."""

    def __init__(self, moment: str, number: int = -1, act: Callable[[int, str | None], None] | None = None) -> None:
        self.moment, self.number, self.act, self.passed, self.step = moment, number, act, 0, 0
        if moment == "resize":
            _put_before(LoRALayer, "set_factors", lambda *_: self._pass("resize"))
        elif moment == CUT:
            _put_before(os, "fsync", lambda handle: self._write(os.readlink(f"/proc/self/fd/{handle}")))
            _put_before(LocalFileOpener, "commit", lambda file: self._pass(CUT, file.temp))
        elif moment == MOVE:
            _put_before(os, "replace", lambda *_: self._pass(MOVE))
            _put_before(shutil, "move", lambda *_: self._pass(MOVE))

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.step = trainer.global_step
        if any(isinstance(c, RankScheduler) and c.driver.progress.pending for c in trainer.callbacks):
            self._pass("decided, not made")

    def on_before_optimizer_step(self, *_: Any) -> None:
        self._pass("inside a step")

    def on_validation_batch_start(self, *_: Any) -> None:
        self._pass("validation")

    def on_train_end(self, *_: Any) -> None:
        self._pass("after the last step")

    def _write(self, name: str) -> None:
        # Folders are synced, too, and are no partial files.
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
    warnings.simplefilter("ignore")
    # torchrun does the same.
    if case.processes > 1:
        count, number = str(case.processes), str(process)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="1", GROUP_RANK="0")
        os.environ.update(WORLD_SIZE=count, LOCAL_WORLD_SIZE=count, RANK=number, LOCAL_RANK=number)
    watches = [Watch(moment) for moment in MOMENTS] if stop is None else []
    if stop is not None and stop.process == process:
        here = os.getpid()
        watches = [Watch(stop.moment, stop.number, lambda step, written: act(stop, folder, here, step, written))]
    end = train(case, folder / "disk", process, [*watches])
    torch.save((end, {watch.moment: watch.passed for watch in watches}), folder / f"end{process}.pt")


def run(case: Case, folder: Path, stop: Stop | None = None) -> list[int]:
    """Start all processes of a run and wait for them; the exit codes, negative after a signal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork, numbers = multiprocessing.get_context("fork"), range(case.processes)
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
    """What is wrong with how AdapterCheckpoint let a run end before its time; None: nothing."""
    if case.callback != "AdapterCheckpoint" or stop.moment == ANY or stop.way == "SIGKILL":
        return None
    if stop.way == FULL:
        return None if codes[0] == 1 else "a full disk was not the exit code 1"
    file, step = folder / "disk" / "last.ckpt", int((folder / "step").read_text())
    saved = torch.load(file)["global_step"] if file.exists() else None
    expected = [130 if stop.way == "SIGINT" and process == stop.process else 0 for process in range(case.processes)]
    return None if codes == expected and saved in (step, step + 1) else f"at step {step} it saved {saved}"


def outcome(case: Case, stop: Stop, folder: Path, expected: list[Any]) -> tuple[bool, str | None]:
    """Stop a run and resume it; whether it was stopped before its end, and what was lost (None: nothing)."""
    codes = run(case, folder, stop)
    stopped = not (folder / "end0.pt").exists()
    fault = broken_promise(case, stop, codes, folder) if stopped else None
    (folder / "disk" / "filler").unlink(missing_ok=True)
    again = run(case, folder) if any(codes) or stopped else codes
    if fault is None and any(again):
        fault = "the resume failed"
    if fault is None and not equal([end for end, _ in ends(case, folder)], [end for end, _ in expected]):
        fault = "it came to other bits"
    return stopped, fault and f"{fault}; exit codes {codes}, then {again}"


def draw(chance: random.Random, ways: list[str], schedules: list[str]) -> tuple[Case, Stop]:
    """A case, and a stop whose number and delay are not limited to the run yet."""
    names = [chance.choice([*table]) for table in (schedules, OPTIMIZERS, CALLBACKS)]
    case = Case(names[0], names[1], chance.choice([1, 2]), names[2], chance.choice([1, 3, 7]))
    way, moment, number, delay = chance.choice(ways), chance.choice(MOMENTS), chance.randrange(10**6), chance.random()
    return case, Stop(way, moment, number, delay, chance.randrange(case.processes), chance.randrange(16_000))


class Matrix:
    """Tries on a small disk, and what has come of them."""

    def __init__(self, top: Path, small: Path) -> None:
        self.top, self.small = top, small
        self.tried, self.lost = Counter[str](), Counter[str]()
        self.wholes: dict[Case, tuple[float, list[Any]]] = {}

    def whole(self, case: Case) -> tuple[float, list[Any]]:
        """Seconds and ends of the run without stops and checkpoints."""
        if case not in self.wholes:
            folder, start = self._folder(), time.perf_counter()
            (folder / "disk").mkdir()
            codes = run(case, folder)
            assert not any(codes), (folder / "printed0").read_text()
            self.wholes[case] = time.perf_counter() - start, ends(case, folder)
        return self.wholes[case]

    def one_try(self, case: Case, stop: Stop) -> None:
        """Stop and resume a run; it counts if it was stopped, or is lost."""
        seconds, expected = self.whole(replace(case, callback=None, every=1))
        counts = expected[0][1] | dict.fromkeys((CUT, MOVE), STEPS // case.every)
        moment = stop.moment if counts[stop.moment] else ANY
        stop = replace(stop, moment=moment, number=stop.number % max(1, counts[moment]), delay=stop.delay * seconds)
        folder = self._folder()
        if stop.way == FULL:
            (folder / "disk").symlink_to(self.small)
        else:
            (folder / "disk").mkdir()
        stopped, fault = outcome(case, stop, folder, expected)
        processes, saved = f"processes: {case.processes}", f"steps between checkpoints: {case.every}"
        keys = (stop.way, stop.moment, case.schedule, case.optimizer, case.callback or "", processes, saved, "all")
        self.tried.update(keys if stopped or fault else ())
        self.lost.update(keys if fault else ())
        if fault:
            printed = [(folder / f"printed{process}").read_text()[-3000:] for process in range(case.processes)]
            print(f"lost: {fault}\n  {case}\n  {stop}", *printed, sep="\n", flush=True)
        for file in self.small.iterdir():
            file.unlink()

    def _folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.top))


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
        small = Path(tempfile.mkdtemp(dir=top))
        mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", small], check=False)
        ways = [way for way in WAYS if way != FULL or mount.returncode == 0]
        matrix = Matrix(Path(top), small)
        try:
            while matrix.tried["all"] < arguments.tries:
                matrix.one_try(*draw(chance, ways, arguments.schedules))
        finally:
            if mount.returncode == 0:
                subprocess.run(["umount", small], check=True)
    print(f"{'':<32}{'tried':>7}{'equal':>7}{'lost':>6}")
    rows = sorted(matrix.tried.items(), key=lambda row: (row[0] == "all", row[0]))
    for key, tried in rows:
        print(f"{key:<32}{tried:>7}{tried - matrix.lost[key]:>7}{matrix.lost[key]:>6}")
    return bool(matrix.lost)


if __name__ == "__main__":
    sys.exit(main())
