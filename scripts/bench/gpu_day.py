"""What one H100 should answer in less than 45 minutes, in phases: README.md in this folder has what each decides.

A phase is a process of its own, with a limit of time: one that fails, or takes too long, leaves the others alone. What
it prints is written to OUT/PHASE.txt line by line, and OUT/phases.csv gets its row (card, phase, exit code, seconds) as
soon as it ends. A phase that has a row with exit code 0 for this card is not run again.
With --device cpu every phase runs in miniature, Triton's kernels in its interpreter: times mean nothing then.
Run: .venv/bin/python scripts/bench/gpu_day.py [--only tests backend …] [--out FOLDER] [--device cpu]
"""

from __future__ import annotations

import argparse
import csv
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from measuring import append_row

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FIELDS = ("card", "phase", "exit", "seconds")


@dataclass(frozen=True)
class Phase:
    """A program and its arguments on a GPU, and in miniature on a CPU.

    Attributes:
        minutes: that it may take on a GPU.
        program: of this folder, or "pytest".
        arguments: on a GPU.
        miniature: on a CPU instead.
    """

    minutes: float
    program: str
    arguments: str
    miniature: str

    def command(self, device: str) -> list[str]:
        """What is run."""
        program = ["-m", "pytest"] if self.program == "pytest" else [str(HERE / self.program)]
        arguments = self.arguments if device == "cuda" else self.miniature
        return [sys.executable, *program, *shlex.split(arguments)]


# In the order in which they are worth their minutes.
PHASES = {
    "tests": Phase(
        5,
        "pytest",
        "tests/kernels/test_on_gpu.py tests/kernels/test_backends.py -q --disable-warnings",
        "tests/kernels/test_triton_interpreter.py -q --disable-warnings -k a_layer_touches",
    ),
    "kernel": Phase(
        3,
        "gpu.py",
        "--shapes 4096x4096 2048x2048 --tokens 512 8192 --ranks 16 --rounds 30",
        "--device cpu --shapes 96x64 --tokens 32 --ranks 8 --rounds 2",
    ),
    "backend": Phase(
        # Rows that were measured stay, so what is left is measured at the next start.
        9,
        "gpu.py",
        "--ranks 8 16 64 --rounds 30",
        "--device cpu --shapes 64x96 --tokens 32 --ranks 8 --rounds 2",
    ),
    "step": Phase(
        7,
        "step.py",
        "--device cuda --dtype bfloat16 --models smollm2 minilm --ranks 16 4 --blocks 24",
        "--models minilm --ranks 8 4 --dropouts 0.1 --blocks 1 --rounds 3",
    ),
    "cut": Phase(
        4,
        "truncate.py",
        "--device cuda --rank 16 --final-rank 4",
        "--layers 14 --size 32 --rank 8 --final-rank 4",
    ),
    "whole": Phase(
        10,
        "whole.py",
        "--device cuda --size 1b --rank 16 --final-rank 4 --steps 60",
        "--device cpu --size tiny --steps 9 --rows 2 --length 16",
    ),
}


def main() -> None:
    """Run what has no row yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PHASES, default=list(PHASES), metavar="PHASE")
    parser.add_argument("--out", type=Path, default=Path("gpu_day"), metavar="FOLDER")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch sees no GPU; run it where one is, or set --device cpu for a miniature")
    card = torch.cuda.get_device_name() if options.device == "cuda" else "CPU (miniature)"
    options.out.mkdir(parents=True, exist_ok=True)
    rows = options.out / "phases.csv"
    failed = []
    for name in options.only:
        if has_passed(rows, card, name):
            print(f"{name}: has passed already", flush=True)
            continue
        start = time.perf_counter()
        code = run(PHASES[name], options.device, options.out / f"{name}.txt")
        seconds = time.perf_counter() - start
        append_row(rows, FIELDS, (card, name, str(code), f"{seconds:.0f}"))
        print(f"{name}: exit code {code}, {seconds:.0f} s, {options.out / f'{name}.txt'}", flush=True)
        if code:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {' '.join(failed)}")


def run(phase: Phase, device: str, output: Path) -> int:
    """Run the phase with its output in the file ``output``; returns its exit code, 124 if its time was over."""
    environment = dict(os.environ, PYTHONUNBUFFERED="1", PYTHONPATH=str(ROOT))
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    with output.open("w", encoding="utf-8") as file:
        try:
            limit = 60 * phase.minutes
            done = subprocess.run(
                phase.command(device), cwd=ROOT, env=environment, stdout=file, stderr=file, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return 124
    return done.returncode


def has_passed(rows: Path, card: str, name: str) -> bool:
    """Whether the file has a row of this phase with exit code 0."""
    if not rows.exists():
        return False
    with rows.open(encoding="utf-8", newline="") as file:
        return any((row["card"], row["phase"], row["exit"]) == (card, name, "0") for row in csv.DictReader(file))


if __name__ == "__main__":
    main()
