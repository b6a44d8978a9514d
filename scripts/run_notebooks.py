"""Runs notebooks, stores their outputs: ``PATH=.venv/bin:$PATH python scripts/run_notebooks.py PLACE/*.ipynb``."""

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def main() -> None:
    """Write each notebook again, with today's outputs."""
    for name in sys.argv[1:]:
        nbformat.write(*ran(Path(name)), name)


def ran(*paths: Path) -> list[nbformat.NotebookNode]:
    """The notebooks with their outputs, each run in an empty folder; the first error of a cell is raised.

    One kernel runs all, because its start and the imports take longer than most cells. A notebook finds no name of the
    one before.
    """
    notebooks = [nbformat.read(path, as_version=4) for path in paths]
    with tempfile.TemporaryDirectory() as folder:
        cells = []
        for number, notebook in enumerate(notebooks):
            own = Path(folder, str(number))
            own.mkdir()
            begin = nbformat.v4.new_code_cell(f"%reset -f\n%cd -q {own}")
            cells += [*([begin] if number else []), *notebook.cells]
        together = nbformat.v4.new_notebook(cells=cells, metadata=notebooks[0].metadata)
        NotebookClient(together, timeout=600, resources={"metadata": {"path": f"{folder}/0"}}).execute()
    for cell in cells:
        # Times of the run, and what libraries say of this machine.
        cell.metadata = {}
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebooks


if __name__ == "__main__":
    main()
