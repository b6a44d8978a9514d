"""A finished run as one page that needs no other file, no script and no network."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from dynrank import __version__
from dynrank.errors import ConfigurationError
from dynrank.output.whole_file import whole_file
from dynrank.run.report.pictures import draw
from dynrank.run.report.record import read_run
from dynrank.run.report.templates import template
from dynrank.run.report.verdict import (
    around,
    compared,
    conclusions,
    kinds_of_loss,
    next_commands,
    read_rival,
    run_name,
)

REPORT_FILE = "report.html"


def write_report(folder: Path, config: str | None = None, against: Sequence[Path] = ()) -> Path:
    """Write ``report.html`` of a finished run into its folder, and its pictures into ``plots/``; returns its path.

    Where matplotlib is not installed the page has no pictures, and says so.

    Args:
        folder: of the run; only its files are read.
        config: as for :func:`dynrank.run.report.record.read_run`.
        against: folders of other finished runs, to compare with.
    """
    run = read_run(folder, config)
    rivals = {run_name(other): read_rival(other) for other in against}
    file = folder / REPORT_FILE
    try:
        page = template("page.html.jinja").render(
            run=run,
            rivals=rivals,
            compared=compared([run.summary, *rivals.values()]),
            title=f"dynrank run {run_name(folder)}",
            conclusions=conclusions(run, rivals),
            kinds_of_loss=kinds_of_loss(run),
            around=partial(around, run),
            pictures=draw(run),
            ranks=run.ranks(),
            next_commands=next_commands(run),
            version=__version__,
        )
        with whole_file(file) as part:
            part.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"cannot write {str(file)!r}: {error.strerror or error}") from None
    return file
