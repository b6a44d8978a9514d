"""What two processes come to: each check of a job with what it has found, or with its traceback."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import forked
import torch
from torch.testing import assert_close

import dynrank


def keep(checks: Mapping[str, Callable[[], Any]], file: Path, results: dict[str, Any]) -> None:
    """Make each check, and keep in the file what all have found so far."""
    for name, check in checks.items():
        start = time.perf_counter()
        try:
            results[name] = check()
        # The other checks have to run, too.
        except Exception:
            results[name] = traceback.format_exc()
            print(name, results[name])
        print(f"{time.perf_counter() - start:5.2f} s {name}", flush=True)
        torch.save(results, file)


def of_pair(program: str, folder: Path, count: int = 2) -> list[dict[str, Any]]:
    """[what process 0 has found, what process 1 has found, …] by a program that keeps it in ``folder``."""
    codes = forked.end(forked.pair(program, folder, cwd=folder, count=count))
    assert codes == [0] * count, forked.printed(folder)[-5000:]
    return [torch.load(folder / f"{process}.pt") for process in range(count)]


def of_interpreters(
    program: Path, folder: Path, *arguments: str, count: int = 2, path: str = ""
) -> list[dict[str, Any]]:
    """The same by a program in new interpreters, which have imported nothing; ``path`` is one of packages."""
    places = Path(dynrank.__file__).parents[1], program.parent, path, os.environ.get("PYTHONPATH", "")
    settings = {"PYTHONPATH": os.pathsep.join(map(str, places)), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    settings |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": forked.free_port()}
    settings |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    command = [sys.executable, "-W", "ignore", str(program), str(folder), *arguments]
    processes = []
    with forked.output(folder).open("a") as output:
        for number in map(str, range(count)):
            environment = os.environ | settings | {"RANK": number, "LOCAL_RANK": number}
            processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    codes = [process.wait() for process in processes]
    assert codes == [0] * count, forked.printed(folder)[-5000:]
    return [torch.load(folder / f"{number}.pt") for number in range(count)]


def found(results: list[dict[str, Any]], name: str) -> Any:
    """What both processes have found by a check, which has not failed in either."""
    first, second = (result[name] for result in results)
    assert not isinstance(first, str), first
    assert not isinstance(second, str), second
    return first, second


def assert_same_bits(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name in ("events", "importance"):
        assert one[name] == other[name]
    for kind in ("weights", "state"):
        assert_close(one[kind], other[kind], rtol=0, atol=0)


def assert_resumed(found_by_both: Any, steps: Sequence[int]) -> None:
    """The checkpoints of these steps have led to the bits of the whole run, in both processes."""
    for ends in found_by_both:
        assert ends.keys() == {"whole", *(f"step {step}" for step in steps)}
        for end in ends.values():
            assert_same_bits(end, ends["whole"])
