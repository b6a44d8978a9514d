"""The notebooks run from beginning to end, and are stored with their outputs."""

import os
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "scripts/examples/notebooks").glob("*.ipynb"))


@pytest.mark.filterwarnings("ignore")
def test_notebooks_run_and_have_their_outputs(script, monkeypatch):
    # The commands of this environment, and this repository's package, for the kernel.
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for path, ran in zip(NOTEBOOKS, script("run_notebooks").ran(*NOTEBOOKS), strict=True):
        stored = nbformat.read(path, as_version=4)
        assert [cell.source for cell in stored.cells] == [cell.source for cell in ran.cells]
        assert [bool(cell.get("outputs")) for cell in stored.cells] == [bool(cell.get("outputs")) for cell in ran.cells]
        assert any("image/png" in output.get("data", {}) for cell in ran.cells for output in cell.get("outputs", ()))
