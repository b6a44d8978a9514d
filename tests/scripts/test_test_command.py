"""scripts/test, with programs that only note how they were called in the place of those that it installs."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def command(tmp_path):
    """Calls scripts/test of a project in which the programs of ``failing`` fail: (exit code, stderr, calls)."""
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/test", "scripts/venv.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)

    def call(*arguments, failing=()):
        for venv in (".venv", ".venv-newest"):
            (tmp_path / venv / "bin").mkdir(parents=True, exist_ok=True)
            for name in ("python", "ruff", "mypy", "pytest"):
                program = tmp_path / venv / "bin" / name
                program.write_text(f'#!/bin/sh\necho "$0 $*" >> calls\nexit {int(name in failing)}\n')
                program.chmod(0o755)
        ended = subprocess.run(
            ["bash", tmp_path / "scripts/test", *arguments], capture_output=True, text=True, check=False
        )
        return ended.returncode, ended.stderr, (tmp_path / "calls").read_text()

    return call


CALLS = [
    # (arguments, programs that fail, what the last line names, whether newest.csv gets a row)
    ("-k budget", (), "", False),
    ("-k budget", ("ruff",), "style", False),
    ("-k budget", ("mypy", "pytest"), "types tests", False),
    ("--newest", (), "", True),
    ("--newest", ("mypy",), "types", False),
    ("--newest --quick", (), "", False),
]


@pytest.mark.parametrize(("arguments", "failing", "named", "noted"), CALLS)
def test_tests_run_whatever_style_and_types_have_come_to(command, arguments, failing, named, noted):
    code, said, calls = command(*arguments.split(), failing=failing)
    assert (code, said) == ((1, f"failed: {named}\n") if failing else (0, ""))
    newest = "--newest" in arguments
    assert f"{'.venv-newest' if newest else '.venv'}/bin/pytest" in calls
    assert newest or calls.endswith(f"{arguments}\n")
    assert ("--constraint constraints.txt --editable .[test]" in calls) is not newest
    assert (".venv-newest/bin/python scripts/newest.py" in calls) == noted
