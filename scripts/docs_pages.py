"""Makes the pages of the site from the repository's own, and builds it: nothing is written twice.

Run ``python scripts/docs_pages.py FOLDER``; it writes FOLDER/pages and FOLDER/site. A page is a whole file or notebook,
or sections of a file. The API is what the packages' ``__all__`` say.
"""

import json
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
CONF = "conf/README.md"
# {page: (heading in the table of contents, its sections)}; a section is a file, or a heading in it and what follows.
PAGES: dict[str, tuple[str, list[tuple[str, str | None]]]] = {
    "index.md": ("Start", [("README.md", None)]),
    "how/command_line.md": (
        "The command line",
        [(CONF, "conf"), (CONF, "Your own data"), (CONF, "The model"), (CONF, "Mixtures of experts")],
    ),
    "how/trainers.md": ("Lightning, transformers' Trainer", [(CONF, "Where you already train")]),
    "how/trl.md": ("TRL", [(CONF, "TRL"), ("scripts/examples/notebooks/trl.ipynb", None)]),
    "how/programs.md": ("axolotl, LLaMA-Factory", [(CONF, "axolotl and LLaMA-Factory")]),
    "how/loops.md": (
        "Your own loop, several GPUs",
        [(CONF, "Fabric, accelerate, your own loop; several GPUs"), (CONF, "Models that do not fit one GPU: FSDP2")],
    ),
    "how/python.md": ("In Python", [(CONF, "In Python")]),
    "how/adalora.md": ("Coming from AdaLoRA", [(CONF, "Coming from AdaLoRA")]),
    "how/answers.md": ("Answers to your files", [(CONF, "Answers to your files")]),
    "how/squeeze.md": ("An adapter that you have", [("scripts/examples/notebooks/squeeze.ipynb", None)]),
    "how/images.md": ("Image models", [(CONF, "Image models")]),
    "how/serving.md": ("Serving", [(CONF, "Where the adapter is served")]),
    "schedules.md": ("Schedules", [(CONF, "Schedules"), (CONF, "Rank maps")]),
    "results.md": ("Results", [("scripts/README.md", None)]),
    "inside/packages.md": ("The package", [("dynrank/README.md", None)]),
    "inside/kernels.md": ("Kernels", [("kernels/README.md", None)]),
    "inside/tests.md": ("Tests", [("tests/README.md", None)]),
    "inside/contributing.md": ("Contributing", [("CONTRIBUTING.md", None)]),
    "changelog.md": ("Changelog", [("CHANGELOG.md", None)]),
}
# Packages whose public names are the API.
PACKAGES = ("dynrank", "dynrank.schedules", "dynrank.triggers", "dynrank.targets", "dynrank.callbacks")
FOLDERS = {"how": "How to", "api": "API", "inside": "Inside"}

# Codes for a terminal.
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
BADGE = re.compile(r"!\[[^\]]*\]\(https://img\.shields\.io/[^)]*\) ?")
HEADING = re.compile(r"^(#{1,3}) (.+)$")
LINK = re.compile(r"(!?)\[([^\]]+)\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)")


def main() -> None:
    """Write the pages, and build the site of them; a warning of mkdocs is an error."""
    folder = Path(sys.argv[1]).resolve()
    pages = folder / "pages"
    shutil.rmtree(pages, ignore_errors=True)
    parts = {source: sections(source) for _, wanted in PAGES.values() for source, _ in wanted}
    homes = {}
    for page, (_, wanted) in PAGES.items():
        for source, heading in wanted:
            for known in [heading] if heading else parts[source]:
                homes[source, known] = page
    lost = [(source, heading) for source, known in parts.items() for heading in known if (source, heading) not in homes]
    if lost:
        sys.exit(f"these sections are on no page of the site: {lost}; add them to PAGES")
    for page, (title, wanted) in PAGES.items():
        texts = []
        for source, heading in wanted:
            text = parts[source][heading] if heading else "\n".join(parts[source].values())
            texts.append(with_links(text, source, page, homes, pages))
        write(pages / page, with_title(title, "\n".join(texts)))
    for package in PACKAGES:
        write(pages / "api" / f"{package}.md", api(package))
    config = mkdocs.config.load_config(
        str(ROOT / "scripts/mkdocs.yml"),
        docs_dir=str(pages),
        site_dir=str(folder / "site"),
        nav=contents(),
        strict=True,
    )
    build(config)


def sections(source: str) -> dict[str, str]:
    """{heading: its text, with the heading}, of the headings of levels 1 to 3 of a page."""
    found: dict[str, str] = {}
    heading = ""
    fenced = False
    text = (ROOT / source).read_text(encoding="utf-8")
    for line in (of_notebook(json.loads(text)) if source.endswith(".ipynb") else text).splitlines():
        fenced ^= line.startswith("```")
        match = HEADING.match(line)
        if match and not fenced:
            heading = match[2]
        found[heading] = f"{found.get(heading, '')}{line}\n"
    return found


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


def with_links(text: str, source: str, page: str, homes: dict[tuple[str, str], str], pages: Path) -> str:
    """The text with links as they are on the site, and each linked picture below its paragraph."""
    here = os.path.dirname(page)

    def moved(link: re.Match[str]) -> str:
        sign, words, path, anchor = link[1], link[2], link[3], link[4] or ""
        target = os.path.normpath(os.path.join(os.path.dirname(source), path)) if path else source
        if (ROOT / target).is_dir():
            target = f"{target}/README.md"
        headings = {known: there for (file, known), there in homes.items() if file == target}
        if not headings:
            kept = pages / "files" / target
            kept.parent.mkdir(parents=True, exist_ok=True)
            # A file that the site has no page of is given as it is; mkdocs takes .md alone for pages.
            shutil.copyfile(ROOT / target, kept)
            return f"{sign}[{words}]({os.path.relpath(f'files/{target}', here)})"
        named = [there for known, there in headings.items() if f"#{slug(known)}" == anchor]
        there = named[0] if named else next(iter(headings.values()))
        return f"[{words}]({os.path.relpath(there, here)}{anchor})"

    paragraphs = []
    for paragraph in LINK.sub(moved, text).split("\n\n"):
        # Badges would be asked of another server.
        paragraph = BADGE.sub("", paragraph)
        drawn = [link for link in LINK.finditer(paragraph) if link[3].endswith(".png") and not link[1]]
        pictures = [f"![{link[2]}]({link[3]}){{ loading=lazy }}" for link in drawn]
        paragraphs.append("\n\n".join([paragraph.rstrip("\n") if drawn else paragraph, *pictures]))
    return "\n\n".join(paragraphs)


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")


def with_title(title: str, text: str) -> str:
    """The text with the page's title for its first heading, which has level 1; later ones keep their distance to it."""
    first, *others = text.lstrip().splitlines()
    level, _, heading = first.partition(" ")
    shown = heading if title == "Start" else title
    # Links lead to the heading's own anchor.
    lines = [f"# {shown} {{ #{slug(heading)} }}"]
    fenced = False
    for line in others:
        fenced ^= line.startswith("```")
        match = HEADING.match(line)
        if match and not fenced:
            line = f"{'#' * max(2, len(match[1]) - len(level) + 1)} {match[2]}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def api(package: str) -> str:
    """The page of a package: its public names, in the order of the alphabet."""
    module = import_module(package)
    about = (module.__doc__ or "").splitlines()[0]
    names = sorted(module.__all__, key=str.lower)
    return "\n\n".join([f"# {package}", about, *(f"::: {package}.{name}" for name in names)]) + "\n"


def contents() -> list[dict[str, object]]:
    """The table of contents, for mkdocs."""
    titles = {page: title for page, (title, _) in PAGES.items()}
    titles |= {f"api/{package}.md": package for package in PACKAGES}
    found: dict[str, list[object]] = {}
    for page, title in titles.items():
        folder = page.partition("/")[0] if "/" in page else page
        found.setdefault(folder, []).append({title: page})
    return [{FOLDERS[key]: pages} if key in FOLDERS else pages[0] for key, pages in found.items()]


def write(path: Path, text: str) -> None:
    """Write a file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
