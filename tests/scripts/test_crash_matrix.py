"""The crash matrix in short: some stops of most kinds; the whole of it is a command of its own."""

from pathlib import Path

import forked

PROGRAM = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from crash_matrix import main
sys.exit(main())
"""


def test_stopped_runs_end_in_the_bits_of_those_that_were_not(tmp_path):
    scripts = Path(__file__).parents[2] / "scripts"
    code, printed = forked.run(PROGRAM, scripts, "--tries", "4", "--seed", "6508", cwd=tmp_path)
    assert code == 0, printed
    kind, tried, survived, lost = printed.splitlines()[-1].split()
    assert (kind, lost) == ("all", "0")
    assert int(tried) == int(survived) == 4
