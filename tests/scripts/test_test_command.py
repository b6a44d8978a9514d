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


@pytest.mark.parametrize(
    ("failing", "named"),
    [((), ""), (("ruff",), "style"), (("mypy", "pytest"), "types tests"), (("pytest",), "tests")],
)
def test_tests_run_whatever_style_and_types_have_come_to(command, failing, named):
    code, said, calls = command("-k", "budget", failing=failing)
    assert code == bool(failing)
    assert said == (f"failed: {named}\n" if failing else "")
    assert "--constraint constraints.txt --editable .[test]" in calls
    assert ".venv/bin/pytest" in calls.splitlines()[-1]
    assert calls.endswith("-k budget\n")


@pytest.mark.parametrize(
    ("arguments", "failing", "noted"), [((), (), True), (("--quick",), (), False), ((), ("mypy",), False)]
)
def test_only_a_whole_suite_that_passes_with_the_newest_versions_is_noted(command, arguments, failing, noted):
    _, _, calls = command("--newest", *arguments, failing=failing)
    assert "--constraint" not in calls
    assert ".venv-newest/bin/pytest" in calls
    assert (".venv-newest/bin/python scripts/newest.py" in calls) == noted
