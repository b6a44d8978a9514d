"""Pictures: losses and ranks of a run, spectra of layers, arms of a sweep. Each function returns a matplotlib figure.

A figure is shown by a notebook, and saved by ``figure.savefig("ranks.png")``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from itertools import cycle
from pathlib import Path
from statistics import fmean, median, stdev
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from torch import nn

from dynrank.adapters.squeeze import LayerSpectrum, inspect
from dynrank.change.directions import LayerDirections
from dynrank.errors import ConfigurationError
from dynrank.layers.finding import lora_layers
from dynrank.output.ranks import block_of, layer_kinds

try:
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
except ModuleNotFoundError as error:
    raise ConfigurationError("pictures need matplotlib: pip install 'dynrank[plots]'") from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

T = TypeVar("T")
Series = tuple[list[int], list[float]]
"""Optimizer steps, and the value of a metric at each step."""


class Picture(Figure):
    """A figure that a notebook shows also where nobody has imported pyplot."""

    def _repr_png_(self) -> bytes:
        content = BytesIO()
        self.savefig(content, format="png", dpi=100)
        return content.getvalue()


class Run(Protocol):
    """A finished run, as of :func:`dynrank.read_run`."""

    @property
    def metrics(self) -> Mapping[str, Series]: ...

    @property
    def layers(self) -> Mapping[str, LayerSpectrum]: ...

    def change_texts(self) -> Mapping[int, str]: ...

    def ranks(self) -> Mapping[str, Sequence[int]]: ...


# Inches. In a picture this narrow, text of 9 points is legible on a phone.
_WIDTH = 4.6
# The most texts that do not overlap.
_NAMED_CHANGES = 8
# The most points of a curve, more than a picture's width in pixels.
_POINTS = 4000


def loss(run: Run | Mapping[str, Series], changes: Mapping[int, str] | None = None) -> Figure:
    """Training loss (each step and a running mean of 20), validation loss, learning rates; a line per change of rank.

    Of a run of more than 4,000 steps only every second, third ... step is drawn.

    Args:
        run: a run of :func:`dynrank.read_run`, or {metric: (optimizer steps, values)} with the metrics train/loss,
            val/loss and lr/….
        changes: {optimizer step: text of the change}; None: those of the run. The texts are drawn if there are at
            most 8.

    >>> figure = loss({"train/loss": ([0, 1, 2], [3.0, 2.0, 1.0])}, {2: "rank 16 → 8"})
    >>> figure.axes[0].get_ylabel()
    'loss (cross-entropy)'
    """
    metrics = run if isinstance(run, Mapping) else run.metrics
    if changes is None:
        changes = {} if isinstance(run, Mapping) else run.change_texts()
    figure, (axes,) = _panels("optimizer step", ["loss (cross-entropy)"])
    steps, losses = metrics.get("train/loss", ([], []))
    drawn = slice(None, None, max(1, -(-len(steps) // _POINTS)))
    means = [fmean(losses[max(0, end - 20) : end]) for end in range(1, len(losses) + 1)]
    axes.plot(steps[drawn], losses[drawn], color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps[drawn], means[drawn], color="tab:blue", label="training, mean of 20")
    if "val/loss" in metrics:
        axes.plot(*metrics["val/loss"], color="tab:orange", marker="o", markersize=4, label="validation")
    _mark(axes, changes)
    rates = {name: series for name, series in metrics.items() if name.startswith("lr/")}
    if rates:
        rate_axes = axes.twinx()
        rate_axes.set_ylabel("learning rate", color="0.4")
        for (name, (at, values)), style in zip(rates.items(), cycle(("-", ":", "--")), strict=False):
            rate_axes.plot(at[drawn], values[drawn], color="0.4", linewidth=0.7, linestyle=style)
            axes.plot([], [], color="0.4", linewidth=0.7, linestyle=style, label=f"rate of {name.removeprefix('lr/')}")
    # Below the picture the legend covers no curve.
    figure.legend(loc="outside lower center", fontsize=9, ncols=2)
    return figure


def quality(metrics: Mapping[str, Series], changes: Mapping[int, str]) -> Figure:
    """Each metric over the run in its own panel; ``changes`` are {optimizer step: text of the change}."""
    figure, rows = _panels("optimizer step", list(metrics), height=1 + 2 * len(metrics))
    for axes, series in zip(rows, metrics.values(), strict=True):
        axes.plot(*series, color="tab:orange", marker="o", markersize=4)
        _mark(axes, changes, named=axes is rows[0])
    return figure


def ranks(of: nn.Module | Run | Mapping[str, Sequence[int]]) -> Figure:
    """The rank of every layer as a number and a colour: blocks below each other, kinds of layers side by side.

    Of a layer that changed, the cell has the first rank and the last. Layers that are the only ones of their kind stand
    below the blocks, with their names.

    Args:
        of: a model with LoRA layers, a run of :func:`dynrank.read_run`, or {layer: its successive ranks}.

    Raises:
        ConfigurationError: if there are no LoRA layers.

    >>> figure = ranks({"h.0.q": [16, 4], "h.1.q": [16, 9], "head": [8]})
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['16→4', '16→9']
    """
    found = _ranks(of)
    kinds = layer_kinds(found)
    counts = Counter(kinds.values())
    rows = sorted({block_of(name) for name, kind in kinds.items() if counts[kind] > 1})
    columns = [kind for kind, count in counts.items() if count > 1]
    single = [name for name, kind in kinds.items() if counts[kind] == 1]
    cells: dict[tuple[int, int], Sequence[int]] = {}
    for name, kind in kinds.items():
        if counts[kind] > 1:
            cells[rows.index(block_of(name)), columns.index(kind)] = found[name]
    below = {(row, 0): found[name] for row, name in enumerate(single)}
    blocks = [f"block {'.'.join(map(str, row))}" for row in rows]
    tables = [(cells, blocks, columns), (below, single, [""])]
    parts = [table for table in tables if table[0]]
    cell = 0.15 + 0.08 * max(len(_first_and_last(own)) for own in found.values())
    width = max(_WIDTH, 1.3 + cell * len(columns))
    heights = [len(names) for _, names, _ in parts]
    above = 0.6 + 0.04 * max(map(len, columns), default=0)
    figure = Picture(figsize=(width, above + 0.2 * sum(heights)), dpi=210, layout="constrained")
    panels = figure.subplots(len(parts), squeeze=False, height_ratios=heights)[:, 0]
    scale = Normalize(vmin=0, vmax=max(own[-1] for own in found.values()))
    for axes, part in zip(panels, parts, strict=True):
        _draw_cells(axes, *part, scale)
    return figure


def _first_and_last(ranks: Sequence[int]) -> str:
    return f"{ranks[0]}→{ranks[-1]}" if len(ranks) > 1 else str(ranks[-1])


def _draw_cells(
    axes: Axes, cells: Mapping[tuple[int, int], Sequence[int]], rows: list[str], columns: list[str], scale: Normalize
) -> None:
    """A table of coloured cells; ``cells`` are {(row, column): successive ranks of a layer}."""
    last = np.full((len(rows), len(columns)), np.nan)
    for (row, column), own in cells.items():
        last[row, column] = own[-1]
        ink = "white" if scale(own[-1]) < 0.6 else "black"
        axes.text(column, row, _first_and_last(own), ha="center", va="center", fontsize=7, color=ink)
    edges = [np.arange(len(names) + 1) - 0.5 for names in (columns, rows)]
    axes.pcolormesh(*edges, last, cmap="viridis", norm=scale, edgecolors="white", linewidth=0.5)
    axes.invert_yaxis()
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.set_xticks(range(len(columns)), columns, fontsize=7, rotation=35, rotation_mode="anchor", ha="left")
    axes.tick_params(length=0, labeltop=True, labelbottom=False)


def spectra(
    of: nn.Module | Run | str | Path | Iterable[LayerSpectrum] | Mapping[str, Sequence[float]],
    title: str = "singular values of the updates",
) -> Figure:
    """Singular values of each layer's update, largest first, relative to the largest.

    Each kind of layer has its own colour, and a thick line for its median.

    Args:
        of: a model with LoRA layers, a run of :func:`dynrank.read_run`, the folder or file of an adapter, the result of
            :func:`dynrank.inspect`, or {layer: its singular values, descending}.
        title: stands above the picture, before the number of layers.

    Raises:
        ConfigurationError: if there are no LoRA layers, or the adapter cannot be read.

    >>> spectra({"h.0.q": [2.0, 1.0], "h.1.q": [3.0, 1.0]}).axes[0].get_title()
    'singular values of the updates, 2 layers'
    """
    found = _spectra(of)
    shares = {name: [v / values[0] for v in values] for name, values in found.items() if values and values[0] > 0}
    kinds = layer_kinds(found)
    present = sorted({kinds[name] for name in shares})
    colours = {kind: f"C{index % 10}" for index, kind in enumerate(present)}
    figure, (axes,) = _panels("singular value", ["relative to the largest"], height=3.6 + 0.2 * len(present))
    for name, values in shares.items():
        # Thinner lines let hundreds of layers remain visible.
        width = 0.9 if len(shares) < 100 else 0.5
        axes.plot(range(1, len(values) + 1), values, color=colours[kinds[name]], alpha=0.3, linewidth=width)
    for index, kind in enumerate(present):
        members = [values for name, values in shares.items() if kinds[name] == kind]
        # zip ends the median at the shortest spectrum.
        typical = [median(column) for column in zip(*members, strict=False)]
        numbers = range(1, len(typical) + 1)
        style = ("-", "--", ":")[index // 10 % 3]
        (line,) = axes.plot(numbers, typical, style, color=colours[kind], linewidth=2, label=f"{kind} ({len(members)})")
        # A line through a single point is invisible.
        if len(typical) == 1:
            line.set_marker("o")
    axes.set_yscale("log")
    # Plain numbers, also between the powers of ten.
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    # A share below a millionth is a rounding error of float32 factors, and would flatten the rest of the picture.
    if shares:
        axes.set_ylim(bottom=max(1e-6, 0.7 * min(values[-1] for values in shares.values())))
    zero = len(found) - len(shares)
    axes.set_title(f"{title}, {len(found)} layers" + (f", {zero} of them zero" if zero else ""))
    if present:
        columns = 2 if max(map(len, present)) < 24 else 1
        figure.legend(loc="outside lower center", fontsize=9, title="median of each kind", ncols=columns)
    return figure


def _ranks(of: nn.Module | Run | Mapping[str, Sequence[int]]) -> Mapping[str, Sequence[int]]:
    if isinstance(of, nn.Module):
        of = {name: [layer.rank] for name, layer in lora_layers(of)}
    elif not isinstance(of, Mapping):
        of = of.ranks()
    return _some(of)


def _spectra(of: Any) -> Mapping[str, Sequence[float]]:
    if isinstance(of, nn.Module):
        return _some(
            {name: values.tolist() for name, values in LayerDirections(dict(lora_layers(of))).values().items()}
        )
    if isinstance(of, Mapping):
        return _some(of)
    if isinstance(of, str | Path):
        of = inspect(of)
    found = of.layers.values() if hasattr(of, "layers") else of
    return _some({layer.layer: layer.singular_values for layer in found})


def _some(found: Mapping[str, T]) -> Mapping[str, T]:
    if not found:
        raise ConfigurationError("there are no LoRA layers to draw; call dynrank.add_lora on the model first")
    return found


def arms(settings: Sequence[Sequence[str]], name: str, panels: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """A panel for each quantity: a dot per run, and per arm the mean and, of several runs, the standard deviation.

    ``settings`` has the settings of each arm, which stand at equal distances; the axis has the title ``name``.
    ``panels`` are {quantity: for each arm, the values of its runs}.
    """
    places = range(len(settings))
    texts = ["\n".join(setting) for setting in settings]
    crowded = max(map(len, texts)) * len(texts) > 40
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Picture(figsize=(4 * across, 3 * down), dpi=120, layout="constrained")
    grid = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in grid[len(panels) :]:
        axes.remove()
    for axes, (quantity, arms) in zip(grid, panels.items(), strict=False):
        for place, values in zip(places, arms, strict=True):
            axes.plot([place] * len(values), values, "o", color="tab:blue", alpha=0.35, markersize=4)
            if values:
                deviation = stdev(values) if len(values) > 1 else None
                axes.errorbar(place, fmean(values), deviation, fmt="_", color="tab:blue", capsize=3)
        axes.set_title(quantity, fontsize=10)
        axes.grid(alpha=0.3)
        axes.set_xticks(places, texts, fontsize=6 if crowded else 8, rotation=90 if crowded else 0)
        axes.set_xlabel(name, fontsize=8)
    return figure


def _panels(xlabel: str, ylabels: Sequence[str], height: float = 3.6) -> tuple[Figure, list[Axes]]:
    """A figure of panels below each other with a shared x axis; ``height`` is in inches."""
    figure = Picture(figsize=(_WIDTH, height), dpi=210, layout="constrained")
    panels = list(figure.subplots(len(ylabels), sharex=True, squeeze=False)[:, 0])
    for axes, ylabel in zip(panels, ylabels, strict=True):
        axes.set_ylabel(ylabel)
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel(xlabel)
    return figure, panels


def _mark(axes: Axes, changes: Mapping[int, str], *, named: bool = True) -> None:
    """Draw a line at each change of rank, with its text above the axes."""
    for step, text in changes.items():
        axes.axvline(step, color="tab:red", linestyle="--", linewidth=1)
        if named and len(changes) <= _NAMED_CHANGES:
            above = axes.get_xaxis_transform()
            axes.text(step, 1.01, text, transform=above, rotation=30, fontsize=9, color="tab:red")
