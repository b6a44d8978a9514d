"""The scripts as modules: what several processes would do is done in this one."""

import importlib
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def script():
    """Imports a script by its name."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in ("examples", "bench", "."):
            patch.syspath_prepend(Path(__file__).resolve().parents[2] / "scripts" / folder)
        yield importlib.import_module


@pytest.fixture
def main(script, monkeypatch, capsys):
    """Runs a script's main() with arguments; returns what it prints."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        script(name).main()
        return capsys.readouterr().out

    return run
