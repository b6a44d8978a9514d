"""The site is built of the repository's pages and docstrings, and none of its links leads nowhere."""

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dynrank", "dynrank.schedules", "dynrank.triggers", "dynrank.targets", "dynrank.callbacks")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    program = [sys.executable, "-W", "ignore", str(ROOT / "scripts/docs_pages.py"), str(folder)]
    # mkdocs --strict: a warning, as of a link or an anchor that does not exist, ends it.
    ours = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, env=ours, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_on_its_page_with_a_text(site, package):
    page = (site / "api" / package / "index.html").read_text(encoding="utf-8")
    for name in import_module(package).__all__:
        assert f'id="{package}.{name}"' in page
    assert ":func:" not in page
    assert "Annotated[" not in page


def test_links_of_built_pages_lead_to_files_and_anchors_that_exist(site):
    pages = {page: page.read_text(encoding="utf-8") for page in site.rglob("index.html")}
    anchors = {page: set(re.findall(r'id="?([^"\s>]+)', text)) for page, text in pages.items()}
    assert len(pages) > 15
    for page, text in pages.items():
        for link in re.findall(r'(?:href|src)="?([^"\s>]+)', text):
            path, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:|//", link):
                continue
            there = (page.parent / path).resolve() if path else page
            there = there / "index.html" if there.is_dir() else there
            assert there.exists(), f"{page}: {link}"
            assert not anchor or there.suffix != ".html" or anchor in anchors[there], f"{page}: {link}"
