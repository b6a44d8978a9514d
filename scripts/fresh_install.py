"""Installs an archive of a release into a new environment, and runs there what two pages of docs/ show.

    python scripts/fresh_install.py dist/dynrank-*.whl [--constraint constraints.txt]

First the core alone: the examples of a loop that need no more, and a command, which has to say what it needs. Then with
dynrank[train]: those with Lightning, too. Arguments after the archive go to pip.
"""

import re
import subprocess
import sys
import venv
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
LOOP = ROOT / "docs/own_loop.md"
PAGES = (LOOP, ROOT / "docs/lightning.md")
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
# What an example of a loop imports from beyond the core.
MORE = re.compile(r"^(?:import|from) lightning\b", flags=re.MULTILINE)
# And from beyond dynrank[train]; the test suite runs these.
OTHERS = re.compile(r"^(?:import|from) accelerate\b", flags=re.MULTILINE)


def main() -> None:
    """Install and run; the first failure ends the program."""
    archive, *options = sys.argv[1:]
    examples = [example for page in PAGES for example in examples_of(page)]
    of_core = [example for example in examples_of(LOOP) if not MORE.search(example)]
    with TemporaryDirectory() as place:
        folder = Path(place)
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv/bin/python"
        pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", *options]
        subprocess.run([*pip, str(Path(archive).resolve())], check=True)
        run_examples(python, of_core, folder, "the core")
        refused = subprocess.run([folder / "venv/bin/dynrank", "ranks"], cwd=folder, capture_output=True, text=True)
        if refused.returncode != 2 or "pip install 'dynrank[train]'" not in refused.stderr:
            sys.exit(f"dynrank without its packages said:\n{refused.stderr}")
        print(f"  a command: {refused.stderr.strip()}")
        subprocess.run([*pip, f"{Path(archive).resolve()}[train]"], check=True)
        run_examples(python, examples, folder, "dynrank[train]")
        for command in ("dynrank", "dynrank-train"):
            subprocess.run([folder / "venv/bin" / command, "--version"], cwd=folder, check=True)


def examples_of(page: Path) -> list[str]:
    """The examples in Python of a page."""
    return [example for example in EXAMPLE.findall(page.read_text(encoding="utf-8")) if not OTHERS.search(example)]


def run_examples(python: Path, examples: list[str], folder: Path, installed: str) -> None:
    """Run each example in a process of its own."""
    print(f"{len(examples)} of the pages' examples with {installed}", flush=True)
    if not examples:
        sys.exit("the pages have no such example")
    for example in examples:
        # -I keeps this repository's own package, and a PYTHONPATH, out of the way.
        subprocess.run([python, "-I", "-W", "ignore", "-c", example], cwd=folder, check=True)


if __name__ == "__main__":
    main()
