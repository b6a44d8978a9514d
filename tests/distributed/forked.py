"""Programs in processes of their own, forked from one that has imported what they need: that takes longer than they."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import sys
import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import dynrank

TRAIN = "from dynrank.train import main; main()"
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["dynrank.app.runs.job", "transformers.trainer", "simple_icd_10_cm"])


def start(program: str, *arguments: Any, cwd: Path, **environment: str) -> Any:
    """``python -W ignore -c program arguments`` as a multiprocessing.Process; :func:`printed` has what it prints.

    Threads are as many as here, so that its numbers are those of this process.
    """
    settings = [*map(str, arguments)], cwd, environment, torch.get_num_threads()
    process = CONTEXT.Process(target=_run, args=(program, *settings))
    # The package may not be installed.
    root = str(Path(dynrank.__file__).parents[1])
    # The child takes the environment in which it is forked.
    with mock.patch.dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", PYTHONPATH=root):
        process.start()
    return process


def run(program: str, *arguments: Any, cwd: Path, **environment: str) -> tuple[int, str]:
    """The exit code of a program (that of a signal is negative), and what it printed."""
    return end([start(program, *arguments, cwd=cwd, **environment)])[0], printed(cwd)


def pair(program: str, *arguments: Any, cwd: Path, count: int = 2) -> list[Any]:
    """Both processes of a program, or ``count``, with the variables that torchrun gives them."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "TORCHELASTIC_RUN_ID": "tests"}
    group |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0"}
    numbers = map(str, range(count))
    return [start(program, *arguments, cwd=cwd, **group, RANK=number, LOCAL_RANK=number) for number in numbers]


def end(processes: list[Any]) -> list[int]:
    """The exit codes of processes, which have a time that is enough beside ten other programs."""
    until = time.monotonic() + 800
    for process in processes:
        process.join(max(0, until - time.monotonic()))
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def free_port() -> str:
    """A port that nobody listens at, for processes that are to meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def printed(cwd: Path) -> str:
    """What all programs that were started in a folder have printed, to stdout and stderr."""
    return output(cwd).read_text()


def output(cwd: Path) -> Path:
    """The file beside the folder that holds it."""
    return cwd.parent / f"{cwd.name}.txt"


def _run(program: str, arguments: list[str], cwd: Path, environment: dict[str, str], threads: int) -> None:
    with output(cwd).open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # What was imported before the fork is never garbage, and each search through it would copy its pages.
    gc.freeze()
    os.chdir(cwd)
    os.environ.update(environment)
    # After a fork torch makes its pool of threads again when a thread first asks for it, and two that ask at once abort
    # the process ("Invalid thread pool"). So this thread asks before others can. A process that forks again would have
    # to do the same, so launchers such as torchrun start new interpreters here.
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    sys.argv = ["-c", *arguments]
    exec(program, {"__name__": "__main__"})
