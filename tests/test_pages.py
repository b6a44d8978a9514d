"""Every block of the pages that a reader may copy is run as printed, in order, in one folder for each page.

The folder is empty but for a small model with the name of one on the hub, which no test can reach.
"""

import re
import shlex
import subprocess
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("[!.]*/README.md")),
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/**/*.md")),
]
BLOCK = re.compile(r"^```(sh|python|yaml)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


COMMANDS = {"dynrank-train": forked.TRAIN, "dynrank": "from dynrank.app.commands.cli import main; main()"}


def run_line(line, folder):
    """Ours by its entry point, which an installed command calls as well; any other by a shell."""
    name, *arguments = shlex.split(line)
    if name in COMMANDS:
        code, printed = forked.run(COMMANDS[name], *arguments, cwd=folder)
        assert code == 0, printed
    else:
        subprocess.run(["bash", "-euc", line], cwd=folder, check=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_runs_as_printed(page, tiny_llama, tmp_path):
    (tmp_path / "HuggingFaceTB").mkdir()
    (tmp_path / "HuggingFaceTB/SmolLM2-135M").symlink_to(tiny_llama)
    for language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "yaml":
            file = tmp_path / re.match(r"# (\S+)\n", text)[1]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        elif language == "python":
            code, printed = forked.run(text, cwd=tmp_path)
            assert code == 0, printed
        else:
            for line in text.splitlines():
                run_line(line, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_the_first_page_is_one_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1000


def test_every_folder_explains_itself():
    assert {page.parent.name for page in PAGES} >= {"dynrank", "conf", "kernels", "tests", "scripts"}
