"""Makes the pages of the site and builds it: nothing is written twice.

Run ``python scripts/docs_pages.py FOLDER``; it writes FOLDER/pages and FOLDER/site. Pages are the files of docs/ and
those of the repository in ``PAGES``; docs/mkdocs.yml has the table of contents. The API is what ``__all__`` of the
packages says.
"""

import json
import logging
import os
import re
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import mkdocs.config
from mkdocs.commands.build import build

ROOT = Path(__file__).resolve().parents[1]
# {file outside of docs/: its page}
PAGES = {
    "README.md": "index.md",
    "scripts/examples/notebooks/trl.ipynb": "notebooks/trl.md",
    "scripts/examples/notebooks/squeeze.ipynb": "notebooks/squeeze.md",
    "scripts/examples/notebooks/steer.ipynb": "notebooks/steer.md",
    "dynrank/README.md": "inside/packages.md",
    "dynrank/foreign.md": "inside/foreign.md",
    "conf/README.md": "inside/conf.md",
    "kernels/README.md": "inside/kernels.md",
    "scripts/README.md": "inside/scripts.md",
    "scripts/bench/README.md": "inside/bench.md",
    "tests/README.md": "inside/tests.md",
    "CONTRIBUTING.md": "inside/contributing.md",
    "CHANGELOG.md": "changelog.md",
}
# The search names these after the pages of one job each.
REFERENCE = ("api/", "inside/", "notebooks/", "changelog")
# Packages whose public names are the API.
PACKAGES = ("dynrank", "dynrank.schedules", "dynrank.triggers", "dynrank.targets", "dynrank.callbacks")

# Codes for a terminal.
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
BADGE = re.compile(r"!\[[^\]]*\]\(https://img\.shields\.io/[^)]*\) ?")
LINK = re.compile(r"(!?)\[([^\]]+)\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)")


def main() -> None:
    """Write the pages, and build the site of them; a warning of mkdocs is an error."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    folder = Path(sys.argv[1]).resolve()
    pages = folder / "pages"
    shutil.rmtree(pages, ignore_errors=True)
    docs = ROOT / "docs"
    homes = PAGES | {str(file.relative_to(ROOT)): str(file.relative_to(docs)) for file in docs.rglob("*.md")}
    for source, page in homes.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = of_notebook(json.loads(text)) if source.endswith(".ipynb") else text
        write(pages, page, with_links(text, source, homes, pages))
    shutil.copyfile(docs / "extra.css", pages / "extra.css")
    for package in PACKAGES:
        write(pages, f"api/{package}.md", api(package))
    config = mkdocs.config.load_config(
        str(docs / "mkdocs.yml"), docs_dir=str(pages), site_dir=str(folder / "site"), strict=True
    )
    build(config)


def of_notebook(notebook: dict[str, Any]) -> str:
    """The cells of a notebook and their stored outputs, as Markdown."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        printed = ""
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f'<img alt="" src="data:image/png;base64,{data["image/png"].strip()}">')
            else:
                printed += "".join(output.get("text", data.get("text/plain", "")))
        if printed:
            parts.append(f"```text\n{COLOURS.sub('', printed).strip()}\n```")
    return "\n\n".join(parts) + "\n"


def with_links(text: str, source: str, homes: dict[str, str], pages: Path) -> str:
    """The text with links as they are on the site, and each linked picture below its paragraph."""
    here = os.path.dirname(homes[source])

    def moved(link: re.Match[str]) -> str:
        sign, words, path, anchor = link[1], link[2], link[3], link[4] or ""
        if not path:
            return link[0]
        target = os.path.normpath(os.path.join(os.path.dirname(source), path))
        if (ROOT / target).is_dir():
            target = f"{target}/README.md"
        if target in homes:
            return f"[{words}]({os.path.relpath(homes[target], here)}{anchor})"
        kept = pages / "files" / target
        kept.parent.mkdir(parents=True, exist_ok=True)
        # A file that the site has no page of is given as it is; mkdocs takes .md alone for pages.
        shutil.copyfile(ROOT / target, kept)
        return f"{sign}[{words}]({os.path.relpath(f'files/{target}', here)})"

    paragraphs = []
    for paragraph in LINK.sub(moved, text).split("\n\n"):
        # Badges would be asked of another server.
        paragraph = BADGE.sub("", paragraph)
        drawn = [link for link in LINK.finditer(paragraph) if link[3].endswith(".png") and not link[1]]
        pictures = [f"![{link[2]}]({link[3]}){{ loading=lazy }}" for link in drawn]
        paragraphs.append("\n\n".join([paragraph.rstrip("\n") if drawn else paragraph, *pictures]))
    return "\n\n".join(paragraphs)


def api(package: str) -> str:
    """The page of a package: its public names, in the order of the alphabet."""
    module = import_module(package)
    about = (module.__doc__ or "").splitlines()[0]
    names = sorted(module.__all__, key=str.lower)
    return "\n\n".join([f"# {package}", about, *(f"::: {package}.{name}" for name in names)]) + "\n"


def write(pages: Path, page: str, text: str) -> None:
    """Write a page, and the folders above it."""
    boost = 0.1 if page.startswith(REFERENCE) else 1
    path = pages / page
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"---\nsearch:\n  boost: {boost}\n---\n\n{text}", encoding="utf-8")


if __name__ == "__main__":
    main()
