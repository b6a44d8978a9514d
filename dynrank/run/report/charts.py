"""Pictures of a run as SVG to stand in a page: texts stay texts, and text and axes take the page's colour."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from html import escape

import matplotlib
from matplotlib.figure import Figure

from dynrank.output.change_table import layer_kinds
from dynrank.output.metrics_csv import series
from dynrank.output.plots import heat_map_figure, loss_figure, quality_figure, quality_metrics, spectra_figure
from dynrank.run.report.record import RunRecord

__all__ = ["Chart", "charts"]

_INK = "#010203"  # a colour that nothing else has, to be found again in what matplotlib writes
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dynrank",  # or the same run gave another file each time
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    "grid.color": _INK,
    "legend.framealpha": 0.0,
    "legend.edgecolor": "none",
}

_WIDTH = 11.5  # inches: as wide as the page

Chart = tuple[str, str]
"""What can be seen, and the picture: an svg element."""


def charts(run: RunRecord) -> dict[str, list[Chart]]:
    """By heading: the loss, what else validations measured, the ranks, and singular values.

    These are shown before the first and the last change and at the end.
    """
    found: dict[str, list[Chart]] = {"Loss": []}  # none of a run that was resumed where it had ended
    file = run.folder / "metrics.csv"
    changes = {change.step: f"rank {change.ranks}" for change in run.made}
    if any(series(file, name)[0] for name in ("train/loss", "val/loss")):
        text = f"Training and validation loss over {run.last_step:,} optimizer steps"
        text += "; dashed: ranks change." if changes else "; no rank changes."
        found["Loss"].append((text, _svg(lambda: loss_figure(file, changes), "loss", text)))
    if measured := quality_metrics(file):
        text = f"In validation over {run.last_step:,} optimizer steps: {', '.join(measured)}."
        found["Quality"] = [(text, _svg(lambda: quality_figure(file, changes), "quality", text))]
    ranks = run.ranks()
    text = f"Rank of each of {len(ranks)} layers over {run.last_step:,} optimizer steps."
    titles = {}
    for i, (name, own) in enumerate(ranks.items()):
        titles[f"name-{i}"] = name
        later = "".join(f", {rank} from step {step}" for step, rank in own[1:])
        titles[f"row-{i}"] = f"{name}: rank {own[0][1]}{later}"
    found["Ranks by layer"] = [(text, _svg(lambda: heat_map_figure(ranks, run.last_step), "ranks", text, titles))]
    kinds = layer_kinds(run.layers)
    spectra = found["Singular values"] = []
    known = [change for change in run.made if change.step in run.earlier_spectra]
    for step in dict.fromkeys(change.step for change in known[:1] + known[-1:]):
        values = run.earlier_spectra[step]
        kept = {name: dict(ranks[name])[step] for name in values}
        spectra.append(_spectra(values, kept, f"before the change at step {step}", kinds))
    values = {name: layer.singular_values for name, layer in run.layers.items()}
    spectra.append(_spectra(values, {}, "at the end", kinds))
    return found


def _spectra(
    spectra: Mapping[str, tuple[float, ...]], kept: Mapping[str, int], when: str, kinds: Mapping[str, str]
) -> Chart:
    text = f"Singular values of {len(spectra)} updates {when}, relative to the largest of each."
    name = f"spectra-{when.rpartition(' ')[2]}"
    return text, _svg(lambda: spectra_figure(spectra, kept, when, kinds), name, text)


def _svg(make: Callable[[], Figure], name: str, label: str, titles: Mapping[str, str] | None = None) -> str:
    """The figure that ``make`` draws, as an element that can stand beside others in a page.

    Args:
        make: draws it.
        name: goes before all ids in the picture, which would be the same in each.
        label: what a screen reader says of it.
        titles: id of a group of the figure (matplotlib's gid) -> text to show where the pointer is on it.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = make()
        figure.set_size_inches(_WIDTH, figure.get_figheight())
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)  # in a page the elements' names suffice
    text = re.sub(r'(?<= d=")[^"]*', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)  # of a 72nd inch
    for gid, title in (titles or {}).items():
        text = text.replace(f'<g id="{gid}">', f'<g id="{gid}"><title>{escape(title)}</title>', 1)
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    width, height = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', text).groups()  # type: ignore[union-attr]
    size = f'width="{float(width):.0f}pt" height="{float(height):.0f}pt"'
    text = text.replace(f'width="{width}pt" height="{height}pt"', f'{size} role="img" aria-label="{escape(label)}"', 1)
    return text.replace(_INK, "currentColor")
