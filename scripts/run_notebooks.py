"""Runs notebooks and stores their outputs: ``python scripts/run_notebooks.py scripts/examples/notebooks/*.ipynb``."""

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def main() -> None:
    """Write each notebook again, with today's outputs."""
    for name in sys.argv[1:]:
        nbformat.write(ran(Path(name)), name)


def ran(path: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs, run in an empty folder; the first error of a cell is raised."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        # Times of the run, and what libraries say of this machine.
        cell.metadata = {}
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    main()
