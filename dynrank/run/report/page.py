"""A finished run as one page that needs no other file, no script and no network."""

from __future__ import annotations

from pathlib import Path

from dynrank import __version__
from dynrank.errors import ConfigurationError
from dynrank.output.whole_file import whole_file
from dynrank.run.report.pictures import draw
from dynrank.run.report.record import read_run
from dynrank.run.report.templates import template

__all__ = ["REPORT_FILE", "write_report"]

REPORT_FILE = "report.html"


def write_report(folder: Path, config: str | None = None) -> Path:
    """Write ``report.html`` of a finished run into its folder, and its pictures into ``plots/``; returns its path.

    Where matplotlib is not installed the page has no pictures, and says so.

    Args:
        folder: of the run; only its files are read.
        config: as for :func:`dynrank.run.report.record.read_run`.

    Raises:
        ConfigurationError: if the folder is not that of a finished run, a file is broken, or it cannot be written.
    """
    run = read_run(folder, config)
    title = "dynrank run " + "/".join(folder.resolve().parts[-2:])  # a run without a name has date and time
    file = folder / REPORT_FILE
    try:
        page = template("page.html.jinja").render(
            run=run, title=title, pictures=draw(run), ranks=run.ranks(), version=__version__
        )
        with whole_file(file) as part:
            part.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"cannot write {str(file)!r}: {error.strerror or error}") from None
    return file
