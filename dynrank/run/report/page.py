"""The page itself: one file that needs no other, no script and no network."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template

from dynrank import __version__
from dynrank.errors import ConfigurationError
from dynrank.output.console import span
from dynrank.run.report.record import Change, RunRecord, read_run

__all__ = ["REPORT_FILE", "write_report"]

REPORT_FILE = "report.html"

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="dynrank $version">
<title>$title</title>
<style>
$style</style>
</head>
<body>
<header>
<h1>$title</h1>
$header</header>
<nav aria-label="Sections">$links</nav>
<main>
$sections</main>
</body>
</html>
""")


def write_report(folder: Path, config: str | None = None) -> Path:
    """Write ``report.html`` of a finished run into its folder, whole or not at all; returns its path.

    Where matplotlib is not installed the page has no pictures, and says so.

    Args:
        folder: of the run; only its files are read.
        config: see :func:`dynrank.run.report.record.read_run`.

    Raises:
        ConfigurationError: if the folder is not that of a finished run, a file is broken, or it cannot be written.
    """
    page = _page(read_run(folder, config))
    file = folder / REPORT_FILE
    part = file.with_name(file.name + ".part")
    try:
        try:
            part.write_text(page, encoding="utf-8")
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigurationError(f"cannot write {str(file)!r}: {error.strerror or error}") from None
    return file


def _page(run: RunRecord) -> str:
    sections = [("Changes of rank", _changes(run.changes)), *_pictures(run)]
    sections += [("Layers", _layers(run)), ("Speed and memory", _phases(run)), ("Configuration", _configuration(run))]
    named = [(re.sub(r"\W+", "-", heading.lower()), heading, body) for heading, body in sections]
    return _PAGE.substitute(
        version=escape(__version__),
        title=escape("dynrank run " + "/".join(run.folder.resolve().parts[-2:])),  # date and time of an unnamed one
        style=(files("dynrank.run.report") / "page.css").read_text(encoding="utf-8"),
        header=_header(run),
        links="".join(f'<a href="#{name}">{escape(heading)}</a>\n' for name, heading, _ in named),
        sections="".join(
            f'<section aria-labelledby="{name}">\n<h2 id="{name}">{escape(heading)}</h2>\n{body}\n</section>\n'
            for name, heading, body in named
        ),
    )


def _header(run: RunRecord) -> str:
    summary = run.summary
    ranks = run.ranks().values()
    facts = {name: f"{value:.4g}" for name, value in summary["test"].items()}
    facts["rank"] = f"{span({own[0][1] for own in ranks})} → {span({own[-1][1] for own in ranks})}"
    facts["layers"] = str(len(run.layers))
    facts |= {f"{name} parameters": f"{count:,}" for name, count in summary["parameters"].items()}
    facts["optimizer steps"] = f"{run.last_step:,}"
    facts["time"] = f"{summary['seconds']:,.0f} s"
    facts["tokens/s in training"] = f"{summary['tokens_per_second']:,.0f}"
    facts["peak memory"] = _mebibytes(summary["peak_memory_bytes"])
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(fact)}</dd></div>\n" for name, fact in facts.items())
    return f"<dl>\n{items}</dl>\n"


def _pictures(run: RunRecord) -> list[tuple[str, str]]:
    if find_spec("matplotlib") is None:
        text = f"No pictures without matplotlib: pip install 'dynrank[plots]', then dynrank report {run.folder}"
        return [("Pictures", f"<p>{escape(text)}</p>")]
    from dynrank.run.report.charts import charts  # matplotlib is an extra

    sections = []
    for heading, found in charts(run).items():
        figures = [f"<figure>\n{svg}\n<figcaption>{escape(text)}</figcaption>\n</figure>" for text, svg in found]
        sections.append((heading, "\n".join(figures) or "<p>metrics.csv has none.</p>"))
    return sections


def _changes(changes: Sequence[Change]) -> str:
    if not changes:
        return "<p>No rank changed in this run.</p>"
    rows = []
    for change in changes:
        energy = [layer.energy_kept for layer in change.layers.values()]
        errors = [layer.predicted_error for layer in change.layers.values()]
        rows.append(
            [
                f"{change.step:,}",
                change.ranks,
                str(len(energy)),
                f"{sum(energy) / len(energy):.3f} ({min(energy):.3f})",
                f"{sum(error**2 for error in errors) ** 0.5:.3g}",
                change.reason,
            ]
        )
    headings = ["step", "rank", "layers", "energy kept (min)", "predicted error", "reason"]
    undone = [change.undone for change in changes]
    return _table("What was changed, and at what cost", headings, rows, text=("reason",), soft=undone)


def _layers(run: RunRecord) -> str:
    headings = ["layer", "d_out × d_in", "rank", "energy kept (min)", "scaling", "σ max", "σ min", "90% energy"]
    headings += ["99% energy", "effective rank", "parameters"]
    rows = []
    for name, own in run.ranks().items():
        layer, ranks = run.layers[name], [str(rank) for _, rank in own]
        energy = [change.layers[name].energy_kept for change in run.made if name in change.layers]
        rows.append(
            [
                name,
                f"{layer.shape[0]} × {layer.shape[1]}",
                " → ".join(ranks if len(ranks) <= 5 else (ranks[0], "…", ranks[-1])),
                f"{min(energy):.3f}" if energy else "–",
                f"{layer.scaling:.4g}",
                f"{layer.singular_values[0]:.3g}",
                f"{layer.singular_values[-1]:.3g}",
                *(str(layer.energy_rank(share)) for share in (0.9, 0.99)),
                f"{layer.effective_rank:.1f}",
                f"{layer.parameters:,}",
            ]
        )
    caption = "The adapter's layers at the end; 90% and 99% energy: how many directions hold that much of it"
    return _table(caption, headings, rows)


def _phases(run: RunRecord) -> str:
    headings = ["from step", "mean rank", "tokens", "tokens/s", "peak memory"]
    rows = [
        [
            f"{phase['first_step']:,}",
            f"{phase['mean_rank']:.4g}",
            f"{phase['tokens']:,}",
            f"{phase['tokens_per_second']:,.0f}",
            _mebibytes(phase["peak_memory_bytes"]),
        ]
        for phase in run.summary["phases"]
    ]
    return _table("Between changes of rank; training batches alone", headings, rows)


def _configuration(run: RunRecord) -> str:
    given = ""
    if run.overrides is not None:
        words = " ".join(f"<code>{escape(override)}</code>" for override in run.overrides)
        given = f"<p>Given on the command line: {words or 'nothing'}</p>\n"
    return f"{given}<pre>{escape(run.config)}</pre>"


def _table(
    caption: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    text: Sequence[str] = (),
    soft: Sequence[bool] | None = None,
) -> str:
    """A table whose first column names its rows.

    Args:
        caption: what is in it.
        headings: of the columns.
        rows: their cells.
        text: headings of columns that hold sentences, not numbers.
        soft: which rows to print more softly; None: none.
    """
    kinds = [' class="text"' if heading in text else "" for heading in headings]
    head = "".join(f'<th scope="col"{k}>{escape(h)}</th>' for h, k in zip(headings, kinds, strict=True))
    lines = []
    for i, row in enumerate(rows):
        cells = "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row[1:], kinds[1:], strict=True))
        start = '<tr class="undone">' if soft and soft[i] else "<tr>"
        lines.append(f'{start}<th scope="row">{escape(row[0])}</th>{cells}</tr>\n')
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(caption)}">\n<table>\n'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(lines)}</tbody>\n"
        "</table>\n</div>"
    )


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"
