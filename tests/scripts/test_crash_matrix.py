"""The crash matrix in short: some stops of most kinds; the whole of it is a command of its own."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "scripts" / "crash_matrix.py"


def test_stopped_runs_end_in_the_bits_of_those_that_were_not():
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--tries", "4", "--seed", "6508"],
        capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROGRAM.parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    kind, tried, survived, lost = done.stdout.splitlines()[-1].split()
    assert (kind, lost) == ("all", "0")
    assert int(tried) == int(survived) == 4
