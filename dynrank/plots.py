"""Pictures of a run: loss with the changes of rank, rank by layer, and singular values."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def plot_loss(metrics_file: Path, changes: Mapping[int, str], file: Path) -> None:
    """Training loss (each step and a running mean of 20) and validation loss; a line per change of rank.

    Args:
        metrics_file: metrics.csv of the run.
        changes: optimizer step -> what happened there.
        file: PNG to write.
    """
    figure, axes = _figure("optimizer step", "loss (cross-entropy)")
    steps, losses = _column(metrics_file, "train/loss")
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps, _running_mean(losses, 20), color="tab:blue", label="training, mean of 20 steps")
    steps, losses = _column(metrics_file, "val/loss")
    axes.plot(steps, losses, color="tab:orange", marker="o", markersize=4, label="validation")
    for step, text in changes.items():
        axes.axvline(step, color="tab:red", linestyle="--", label=text)
    axes.legend()
    figure.savefig(file)


def plot_ranks(before: Mapping[str, int], after: Mapping[str, int], file: Path) -> None:
    """The rank of every layer at the start and at the end of the run.

    Args:
        before: layer -> rank.
        after: the same layers.
        file: PNG to write.
    """
    names = list(after)
    figure, axes = _figure("rank", "", height=1.5 + 0.2 * len(names))
    rows = range(len(names))
    axes.barh(rows, [before[name] for name in names], color="lightgray", label="start")
    axes.barh(rows, [after[name] for name in names], color="tab:blue", height=0.5, label="end")
    axes.set_yticks(rows, names, fontsize=7)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)  # above the bars
    figure.savefig(file)


def plot_spectra(spectra: Mapping[str, Sequence[float]], kept: Mapping[str, int], title: str, file: Path) -> None:
    """Singular values of each layer's update, largest first, relative to the largest.

    Args:
        spectra: layer -> singular values, descending.
        kept: layer -> how many stay.
        title: of the picture.
        file: PNG to write.
    """
    figure, axes = _figure("singular value", "relative to the largest")
    for values in spectra.values():
        if values and values[0] > 0:
            axes.plot(
                range(1, len(values) + 1), [v / values[0] for v in values], color="tab:blue", alpha=0.3, linewidth=0.9
            )
    for rank in sorted(set(kept.values())):
        axes.axvline(rank + 0.5, color="tab:red", linestyle="--", label=f"kept: {rank}")
    axes.set_yscale("log")
    axes.set_title(f"{title}, {len(spectra)} layers")
    axes.legend()
    figure.savefig(file)


def _figure(xlabel: str, ylabel: str, height: float = 4.5) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, height), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def _column(metrics_file: Path, name: str) -> tuple[list[int], list[float]]:
    with metrics_file.open(newline="", encoding="utf-8") as file:
        rows = [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row.get(name)]
    return [step for step, _ in rows], [value for _, value in rows]


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]
