"""The site is built of the pages and docstrings; its links lead somewhere, and its search finds what users look for."""

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dynrank", "dynrank.schedules", "dynrank.triggers", "dynrank.targets", "dynrank.callbacks")

# What a user types into the search, and the page that answers it.
ANSWERS = {
    "max_lora_rank": "serve/",
    "slot": "serve/",
    "pinned": "single_layers/",
    "highest": "single_layers/",
    "which rank": "schedules/",
    "cut twice": "schedules/",
    "rate after a cut": "schedules/",
    "undo": "schedules/",
    "best checkpoints": "schedules/",
    "resume": "schedules/",
    "experts": "single_layers/",
    "DeepSpeed": "several_gpus/",
    "FSDP2": "several_gpus/",
    "TRL": "peft_trl/",
    "LightningCLI": "lightning/",
    "llama.cpp": "serve/",
    "QLoRA": "peft_trl/",
    "AdaLoRA": "peft_trl/",
    "axolotl": "peft_trl/",
    "image models": "adapters/",
    "4 bits": "adapters/",
    "your own data": "command_line/",
    "rows of a file": "command_line/",
    "configuration keys": "command_line/",
}


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
    # A heading weighs a thousand times as much as a text, so a page that has the words in one is among the first.
    found = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))["docs"]
    for words, answer in ANSWERS.items():
        whole = re.compile(rf"\b{re.escape(words)}\b", re.IGNORECASE)
        headed = [doc["location"] for doc in found if whole.search(doc["title"])]
        assert any(place.startswith(answer) for place in headed), (words, headed)
    pages = {page: page.read_text(encoding="utf-8") for page in site.rglob("index.html")}
    anchors = {page: set(re.findall(r'id="?([^"\s>]+)', text)) for page, text in pages.items()}
    assert {site / page.stem / "index.html" for page in ROOT.glob("docs/*.md")} < pages.keys()
    for page, text in pages.items():
        for link in re.findall(r'(?:href|src)="?([^"\s>]+)', text):
            path, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:|//", link):
                continue
            there = (page.parent / path).resolve() if path else page
            there = there / "index.html" if there.is_dir() else there
            assert there.exists(), f"{page}: {link}"
            assert not anchor or there.suffix != ".html" or anchor in anchors[there], f"{page}: {link}"
