"""The templates of a run's report and card, and their filters."""

import re
from base64 import b64encode
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from dynrank.output.console import one_line, span


def template(name: str) -> Template:
    """The template in the file ``name``; in HTML, inserted values are escaped."""
    found = Environment(
        loader=PackageLoader("dynrank.run.report", ""),
        autoescape=".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters |= {"as": format, "span": span, "data_uri": _data_uri, "code": _code}
    found.filters["mebibytes"] = lambda count: f"{count / 2**20:,.0f} MiB"
    return found.get_template(name)


def _code(text: str) -> str:
    """``text`` as code in one line of Markdown, so that it makes no links and no HTML."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {one_line(text)} {fence}" if len(fence) > 1 else f"`{one_line(text)}`"


def _data_uri(picture: Path) -> str:
    return f"data:image/png;base64,{b64encode(picture.read_bytes()).decode()}"
