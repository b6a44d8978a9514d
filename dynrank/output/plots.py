"""Pictures of a run: loss with the changes of rank, rank by layer, and singular values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, stdev

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from dynrank.output.metrics_csv import metric_names, series

_NAMED_CHANGES = 8  # more texts than that would lie on each other
_POINTS = 4000  # of a curve: more than a picture has pixels across


def plot_loss(metrics_file: Path, changes: Mapping[int, str], file: Path) -> None:
    """Write :func:`loss_figure` to a PNG file."""
    loss_figure(metrics_file, changes).savefig(file)


def loss_figure(metrics_file: Path, changes: Mapping[int, str]) -> Figure:
    """Training loss (each step and a running mean of 20) and validation loss; a line per change of rank.

    Of more than 4,000 steps every second, third ... is drawn.

    Args:
        metrics_file: metrics.csv of the run.
        changes: optimizer step -> what happened there, written beside the line where there are few.
    """
    figure, axes = _figure("optimizer step", "loss (cross-entropy)")
    steps, losses = series(metrics_file, "train/loss")
    drawn = slice(None, None, 1 + len(steps) // _POINTS)
    axes.plot(steps[drawn], losses[drawn], color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps[drawn], _running_mean(losses, 20)[drawn], color="tab:blue", label="training, mean of 20 steps")
    steps, losses = series(metrics_file, "val/loss")
    axes.plot(steps, losses, color="tab:orange", marker="o", markersize=4, label="validation")
    _mark(axes, changes)
    axes.legend()
    return figure


def quality_metrics(metrics_file: Path) -> list[str]:
    """Names of what validations have measured beside the loss, as ``val/accuracy``."""
    names = [name for name in metric_names(metrics_file) if name.startswith("val/") and name != "val/loss"]
    return [name for name in names if series(metrics_file, name)[0]]


def plot_quality(metrics_file: Path, changes: Mapping[int, str], file: Path) -> None:
    """Write :func:`quality_figure` to a PNG file."""
    quality_figure(metrics_file, changes).savefig(file)


def quality_figure(metrics_file: Path, changes: Mapping[int, str]) -> Figure:
    """Each of :func:`quality_metrics` over the run, one below the other; a line per change of rank.

    Args:
        metrics_file: metrics.csv of the run, with such metrics.
        changes: as for :func:`loss_figure`.
    """
    names = quality_metrics(metrics_file)
    figure = Figure(figsize=(8, 1 + 2 * len(names)), dpi=120, layout="constrained")
    rows = figure.subplots(len(names), sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(rows, names, strict=True):
        axes.plot(*series(metrics_file, name), color="tab:orange", marker="o", markersize=4)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        _mark(axes, changes, named=axes is rows[0])
    rows[-1].set_xlabel("optimizer step")
    return figure


def _mark(axes: Axes, changes: Mapping[int, str], *, named: bool = True) -> None:
    """A line at each change of rank, and what happened there in the upper margin, where no curve runs."""
    for step, text in changes.items():
        axes.axvline(step, color="tab:red", linestyle="--", linewidth=1)
        axes.annotate(
            text if named and len(changes) <= _NAMED_CHANGES else "",
            (step, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            rotation=30,
            fontsize=8,
            color="tab:red",
        )


def heat_map_figure(ranks: Mapping[str, Sequence[tuple[int, int]]], last_step: int) -> Figure:
    """The rank of every layer over the run: steps on x, layers on y, one colour for each rank that occurs.

    The bars of the i-th layer have the id (matplotlib's gid) ``row-i``, its name ``name-i``.

    Args:
        ranks: layer -> (optimizer step, rank from there on), steps ascending.
        last_step: where the picture ends.
    """
    levels = sorted({rank for changes in ranks.values() for _, rank in changes})
    colours = ListedColormap(
        colormaps["viridis"]([0.12 + 0.85 * i / max(1, len(levels) - 1) for i in range(len(levels))])
    )
    row, size = (0.17, 7) if len(ranks) <= 60 else (0.12, 5.5)  # inches, points
    height = 1.5 + row * len(ranks)
    figure, axes = _figure("optimizer step", "", height)
    for i, changes in enumerate(ranks.values()):
        ends = [step for step, _ in changes[1:]] + [last_step]
        bars = [(step, end - step) for (step, _), end in zip(changes, ends, strict=True)]
        faces = [colours(levels.index(rank)) for _, rank in changes]
        axes.broken_barh(bars, (i - 0.45, 0.9), facecolors=faces, gid=f"row-{i}")
    axes.set_yticks(range(len(ranks)), [_short(name) for name in ranks], fontsize=size)
    for i, label in enumerate(axes.get_yticklabels()):
        label.set_gid(f"name-{i}")
    axes.set_xlim(0, last_step)
    axes.set_ylim(len(ranks) - 0.5, -0.5)
    axes.grid(visible=False)
    norm = BoundaryNorm([i - 0.5 for i in range(len(levels) + 1)], max(2, len(levels)))
    bar = figure.colorbar(
        ScalarMappable(norm, colours), ax=axes, location="top", aspect=60, pad=0.2 / height, label="rank"
    )
    named = range(0, len(levels), 1 + (len(levels) - 1) // 16)
    bar.set_ticks(named, labels=[str(levels[i]) for i in named])
    bar.minorticks_off()
    return figure


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


def plot_spectra(
    spectra: Mapping[str, Sequence[float]],
    kept: Mapping[str, int],
    title: str,
    file: Path,
    kinds: Mapping[str, str] | None = None,
) -> None:
    """Write :func:`spectra_figure` to a PNG file."""
    spectra_figure(spectra, kept, title, kinds).savefig(file)


def spectra_figure(
    spectra: Mapping[str, Sequence[float]],
    kept: Mapping[str, int],
    title: str,
    kinds: Mapping[str, str] | None = None,
) -> Figure:
    """Singular values of each layer's update, largest first, relative to the largest.

    Args:
        spectra: layer -> singular values, descending.
        kept: layer -> how many stay.
        title: of the picture.
        kinds: layer (or more of them) -> kind of layer, which has its own colour, and its median drawn boldly; None:
            one colour for all.
    """
    shares = {name: [v / values[0] for v in values] for name, values in spectra.items() if values and values[0] > 0}
    every = sorted(set(kinds.values())) if kinds else []
    found = [kind for kind in every if kinds and any(kinds[name] == kind for name in shares)]
    figure, axes = _figure("singular value", "relative to the largest", height=max(4.5, 0.22 * len(found)))
    colours = {kind: f"C{index % 10}" for index, kind in enumerate(every)}
    width = 0.9 if len(shares) < 100 else 0.5  # hundreds of lines must not hide each other
    for name, values in shares.items():
        colour = colours[kinds[name]] if kinds else "tab:blue"
        axes.plot(range(1, len(values) + 1), values, color=colour, alpha=0.3, linewidth=width)
    for index, kind in ((every.index(kind), kind) for kind in found):
        members = [values for name, values in shares.items() if kinds and kinds[name] == kind]
        typical = [median(column) for column in zip(*members, strict=False)]  # as far as the shortest goes
        style = ("-", "--", ":")[index // 10 % 3]
        label = f"{kind} ({len(members)})"
        axes.plot(range(1, len(typical) + 1), typical, color=colours[kind], linewidth=2, linestyle=style, label=label)
    ranks = sorted(set(kept.values()))
    for rank in ranks if len(ranks) <= 3 else ():
        axes.axvline(rank + 0.5, color="tab:red", linestyle="--", label=f"kept: {rank}")
    if len(ranks) > 3:
        axes.axvspan(
            ranks[0] + 0.5, ranks[-1] + 0.5, color="tab:red", alpha=0.1, label=f"kept: {ranks[0]} to {ranks[-1]}"
        )
    axes.set_yscale("log")
    if shares:  # below a millionth is rounding in float32 factors, and would flatten the rest
        axes.set_ylim(bottom=max(1e-6, 0.7 * min(values[-1] for values in shares.values())))
    zero = len(spectra) - len(shares)
    axes.set_title(f"{title}, {len(spectra)} layers" + (f", {zero} of them zero" if zero else ""))
    if found:
        figure.legend(loc="outside right upper", fontsize=8, title="median of each kind", title_fontsize=8)
    elif kept:
        axes.legend()
    return figure


def plot_memory(bars: Mapping[str, Mapping[str, int]], budget: int | None, title: str, file: Path) -> None:
    """A bar for each way to train, made of its parts; a line for the budget.

    Args:
        bars: what to write below a bar -> part -> bytes; all with the same parts.
        budget: bytes, if there is one.
        title: of the picture.
        file: to write.
    """
    figure, axes = _figure("rank (ckpt: with gradient checkpointing)", "GiB")
    bottoms = [0.0] * len(bars)
    for part in next(iter(bars.values())):
        heights = [parts[part] / 2**30 for parts in bars.values()]
        axes.bar(range(len(bars)), heights, bottom=bottoms, label=part)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    highest = max(bottoms)
    if budget is not None:
        axes.axhline(budget / 2**30, color="tab:red", linestyle="--", label=f"budget: {budget / 2**30:g} GiB")
        highest = max(highest, budget / 2**30)
    axes.set_xticks(range(len(bars)), list(bars), fontsize=8)
    axes.set_ylim(0, highest * 1.05)
    axes.set_title(title, fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(file)


def arms_figure(
    settings: Sequence[Sequence[str]], name: str, panels: Mapping[str, Sequence[Sequence[float]]]
) -> Figure:
    """A panel for each quantity: the runs of every arm as dots, their mean with the standard deviation over them.

    Args:
        settings: of each arm; one number each goes onto a scale, anything else side by side.
        name: of the setting.
        panels: quantity -> arm -> values of its runs.
    """
    try:
        places, line = [float(text) for (text,) in settings], "-"
    except ValueError:
        places, line = [float(number) for number in range(len(settings))], "none"  # nothing lies between names
    texts = ["\n".join(setting) for setting in settings]
    crowded = max(map(len, texts)) * len(texts) > 40
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(4 * across, 3 * down), dpi=120, layout="constrained")
    grid = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in grid[len(panels) :]:
        axes.remove()
    for axes, (quantity, arms) in zip(grid, panels.items(), strict=False):
        dots = [(place, value) for place, values in zip(places, arms, strict=True) for value in values]
        axes.plot([place for place, _ in dots], [value for _, value in dots], "o", alpha=0.35, markersize=4)
        known = [(place, values) for place, values in zip(places, arms, strict=True) if values]
        means, spreads = [fmean(v) for _, v in known], [stdev(v) if len(v) > 1 else 0.0 for _, v in known]
        axes.errorbar([p for p, _ in known], means, spreads, color="tab:blue", capsize=3, marker="_", linestyle=line)
        axes.set_title(quantity, fontsize=10)
        axes.grid(alpha=0.3)
        axes.set_xticks(places, texts, fontsize=6 if crowded else 8, rotation=90 if crowded else 0)
        axes.set_xlabel(name, fontsize=8)
    return figure


def _figure(xlabel: str, ylabel: str, height: float = 4.5) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, height), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def _short(name: str, width: int = 44) -> str:
    """``name`` with words in its middle left out as far as it has to be; numbers, which tell layers apart, last.

    >>> _short("base.transformer.encoder.layers.17.self_attention.query_projection", 42)
    'base.….17.self_attention.query_projection'
    """
    parts = name.split(".")
    for part in parts[1:-1]:
        if len(".".join(parts)) > width and not part.isdecimal():
            at = parts.index(part, 1)
            parts[at : at + 1] = [] if parts[at - 1] == "…" else ["…"]
    text = ".".join(parts)
    return text if len(text) <= width else f"{text[: width // 2]}…{text[1 + width // 2 - width :]}"
