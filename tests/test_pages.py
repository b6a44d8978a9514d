"""Every block of the pages that a reader may copy is run as printed, in order, in one empty folder for each page."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md")), ROOT / "CONTRIBUTING.md"]
BLOCK = re.compile(r"^```(sh|python|yaml)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def run(command, folder):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.timeout(1500)  # for a machine with ten other processes
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_runs_as_printed(page, tmp_path):
    for language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "yaml":  # its first line names the file
            (tmp_path / re.match(r"# (\S+)\n", text)[1]).write_text(text)
        elif language == "python":
            run([sys.executable, "-W", "ignore", "-c", text], tmp_path)
        else:
            run(["bash", "-euc", text], tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_the_first_page_is_one_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_folder_explains_itself():
    assert {page.parent.name for page in PAGES} >= {"dynrank", "conf", "kernels", "tests", "scripts"}
