"""The templates of what a run tells of itself, and how they write numbers."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from dynrank.output.console import span

__all__ = ["template"]


def template(name: str) -> Template:
    """The template in the file ``name``; of HTML, what is put in is escaped."""
    found = Environment(
        loader=PackageLoader("dynrank.run.report", ""),
        autoescape=".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters |= {"as": format, "span": span, "data_uri": _data_uri}
    found.filters["mebibytes"] = lambda count: f"{count / 2**20:,.0f} MiB"
    return found.get_template(name)


def _data_uri(picture: Path) -> str:
    return f"data:image/png;base64,{b64encode(picture.read_bytes()).decode()}"
