"""A finished run as one page that needs no other file, no script and no network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dynrank import __version__
from dynrank.errors import ConfigurationError
from dynrank.output.whole_file import whole_file
from dynrank.run.report.record import RunRecord, read_run
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

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_report(folder: Path, config: str | None = None, against: Sequence[Path] = ()) -> Path:
    """Write ``report.html`` of the run in ``folder`` from its files, and pictures into ``plots/``; returns the page.

    Without matplotlib the page has no pictures, and says so. It compares the run with those in the folders ``against``.
    For ``config`` see :func:`dynrank.run.report.record.read_run`.
    """
    run = read_run(folder, config)
    rivals = {run_name(other): read_rival(other) for other in against}
    file = folder / "report.html"
    try:
        page = template("page.html.jinja").render(
            run=run,
            rivals=rivals,
            compared=compared([run.summary, *rivals.values()]),
            title=f"dynrank run {run_name(folder)}",
            conclusions=conclusions(run, rivals),
            kinds_of_loss=kinds_of_loss(run),
            around=partial(around, run),
            pictures=_draw(run),
            ranks=run.ranks(),
            next_commands=next_commands(run),
            version=__version__,
        )
        with whole_file(file) as part:
            part.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"cannot write {str(file)!r}: {error.strerror or error}") from None
    return file


def _draw(run: RunRecord) -> dict[str, Path]:
    """Write the pictures of ``run``; returns {caption: PNG file} for the page, empty without matplotlib."""
    if find_spec("matplotlib") is None:
        return {}
    folder = run.folder / "plots"
    folder.mkdir(exist_ok=True)
    pictures = {}
    for name, caption, figure in _figures(run):
        figure.savefig(folder / f"{name}.png")
        # If all layers have the same rank, a line of text says more than bars of one colour.
        if name != "ranks" or run.layers_differ:
            pictures[caption] = folder / f"{name}.png"
    return pictures


def _figures(run: RunRecord) -> Iterator[tuple[str, str, Figure]]:
    """(name of the file, caption, figure) of each picture."""
    # matplotlib is an optional dependency.
    from dynrank.output.plots import loss_figure, quality_figure, ranks_figure, spectra_figure

    changes = {change.step: f"rank {change.ranks}" for change in run.made}
    over = f"over {run.last_step:,} optimizer steps"
    # A run that was resumed at its last step has no losses.
    if run.metrics.keys() & {"train/loss", "val/loss"}:
        end = "dashed: ranks change" if changes else "no rank changes"
        yield "loss", f"Training and validation loss {over}; {end}.", loss_figure(run.metrics, changes)
    quality = {name: run.metrics[name] for name in run.metrics if name.startswith("val/") and name != "val/loss"}
    if quality:
        yield "quality", f"In validation {over}: {', '.join(quality)}.", quality_figure(quality, changes)
    ranks = run.ranks()
    yield "ranks", f"Rank of {len(ranks)} layers {over}.", ranks_figure(ranks, run.last_step)
    spectra = {name: layer.singular_values for name, layer in run.layers.items()}
    caption = f"Singular values of {len(spectra)} updates at the end, relative to the largest of each."
    yield "spectra", caption, spectra_figure(spectra, {}, "at the end")
