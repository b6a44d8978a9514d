"""The scripts as modules: what several processes would do is done in this one."""

import importlib
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def script():
    """Imports a script by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).resolve().parents[2] / "scripts")
        yield importlib.import_module
