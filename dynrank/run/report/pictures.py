"""The pictures of a run, written to its plots/ and shown in its report."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dynrank.run.report.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(run: RunRecord) -> dict[str, Path]:
    """Write the pictures of ``run``; returns {what is seen: PNG file}, nothing where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return {}
    folder = run.folder / "plots"
    folder.mkdir(exist_ok=True)
    pictures = {}
    for name, caption, figure in _figures(run):
        figure.savefig(folder / f"{name}.png")
        # Bars of one colour say less than a line of text.
        if name != "ranks" or run.layers_differ:
            pictures[caption] = folder / f"{name}.png"
    return pictures


def _figures(run: RunRecord) -> Iterator[tuple[str, str, Figure]]:
    """(name of the file, caption, figure) of each picture."""
    # matplotlib is an extra.
    from dynrank.output.plots import loss_figure, quality_figure, ranks_figure, spectra_figure

    changes = {change.step: f"rank {change.ranks}" for change in run.made}
    over = f"over {run.last_step:,} optimizer steps"
    # A run that was resumed where it had ended has no losses.
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
