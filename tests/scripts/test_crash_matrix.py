"""The crash matrix in short: one kill of most kinds; the whole of it is a command of its own."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "scripts" / "crash_matrix.py"


def test_killed_runs_end_in_the_bits_of_the_one_that_was_not():
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--tries", "6", "--seed", "3"],
        capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROGRAM.parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    kind, tried, survived, lost = done.stdout.splitlines()[-1].split()
    assert (kind, lost) == ("all", "0")
    assert int(tried) == int(survived) >= 5  # a run may end before its random time
