"""The site is built of the repository's pages and docstrings, and none of its links leads nowhere."""

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dynrank", "dynrank.schedules", "dynrank.triggers", "dynrank.targets", "dynrank.callbacks")


def test_site_has_every_public_name_and_its_links_lead_somewhere(tmp_path):
    program = [sys.executable, "-W", "ignore", str(ROOT / "scripts/docs_pages.py"), str(tmp_path)]
    # mkdocs --strict: a warning, as of a link or an anchor that does not exist, ends it.
    ours = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, env=ours, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "site"
    for package in PACKAGES:
        page = (site / "api" / package / "index.html").read_text(encoding="utf-8")
        for name in import_module(package).__all__:
            assert f'id="{package}.{name}"' in page
        assert ":func:" not in page
        assert "Annotated[" not in page
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
