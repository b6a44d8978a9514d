"""The page of a finished run, which needs no other file, no script and no network, and the README.md of its adapter."""

import re
from base64 import b64encode
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from dynrank import __version__
from dynrank.adapters.sidecar_files import label_names, read_inputs
from dynrank.app.console import one_line
from dynrank.app.runs.command import read_overrides
from dynrank.app.runs.folder import CONFIG, REPORT
from dynrank.app.runs.report.record import RunRecord, read_run
from dynrank.app.runs.summary import Summary, read_summary
from dynrank.layers.finding import lora_layers
from dynrank.output.console import span
from dynrank.output.ranks import layer_kinds
from dynrank.output.slots import slot_rank
from dynrank.output.whole_file import whole_file
from dynrank.private import source_of


def write_report(folder: Path, against: Sequence[Path] = ()) -> Path:
    """Write ``report.html`` of the run in ``folder`` from its files, and pictures into ``plots/``; returns the page.

    Without matplotlib the page has no pictures, and says so. It compares the run with those in the folders ``against``.
    """
    run = read_run(folder)
    results = pd.DataFrame([summary.results() for summary in (run.summary, *map(read_summary, against))])
    page = template("page.html.jinja").render(
        run=run,
        # The last two parts of a path are the date and the time for a run without a name.
        names=["/".join(path.resolve().parts[-2:]) for path in (folder, *against)],
        results=results.fillna("–").to_dict("list"),
        pictures=_draw(run),
        overrides=read_overrides(folder),
        config=(folder / CONFIG).read_text(encoding="utf-8"),
        version=__version__,
    )
    with whole_file(folder / REPORT) as part:
        part.write_text(page, encoding="utf-8")
    return folder / REPORT


def write_card(folder: Path, model: Any, summary: Summary, command: str | None) -> None:
    """Write README.md into the adapter's ``folder``; ``command`` trains such an adapter, None if it is not known."""
    base = source_of(model)
    ranks: dict[str, list[int]] = {}
    layers = {name: layer.rank for name, layer in lora_layers(model)}
    for name, kind in layer_kinds(layers).items():
        ranks.setdefault(kind, []).append(layers[name])
    page = template("card.md.jinja").render(
        base=base,
        on_hub=bool(re.fullmatch(r"[\w.-]+/[\w.-]+", base)) and not Path(base).exists(),
        kind=type(model).__name__,
        labels=label_names(model),
        learned=read_inputs(folder),
        ranks=ranks,
        slot=slot_rank(max(layers.values())),
        summary=summary,
        command=command,
        version=__version__,
    )
    with whole_file(folder / "README.md") as part:
        part.write_text(page, encoding="utf-8")


def template(name: str) -> Template:
    """The template in the file ``name``; in HTML, inserted values are escaped."""
    found = Environment(
        loader=PackageLoader("dynrank.app.runs.report", ""),
        autoescape=".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters |= {"as": format, "span": span, "data_uri": _data_uri, "code": _code}
    return found.get_template(name)


def _code(text: str) -> str:
    """``text`` as code in one line of Markdown, so that it makes no links and no HTML."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {one_line(text)} {fence}" if len(fence) > 1 else f"`{one_line(text)}`"


def _data_uri(picture: Path) -> str:
    return f"data:image/png;base64,{b64encode(picture.read_bytes()).decode()}"


def _draw(run: RunRecord) -> dict[str, Path]:
    """Write the pictures of ``run``; returns {caption: PNG file} for the page, empty without matplotlib."""
    if find_spec("matplotlib") is None:
        return {}
    # matplotlib is an optional dependency.
    from dynrank import plot

    quality = {name: run.metrics[name] for name in run.metrics if name.startswith("val/") and name != "val/loss"}
    loss = "Training and validation loss; dashed: ranks change. Training loss is of one batch before its step, with "
    drawn = {loss + "the dropout and label smoothing that are set.": ("loss", plot.loss(run))}
    if quality:
        drawn[f"In validation: {', '.join(quality)}."] = ("quality", plot.quality(quality, run.change_texts()))
    ranks = "Ranks of the layers, the first → the last: a row for each block, a column for each kind of layer."
    drawn[ranks] = ("ranks", plot.ranks(run))
    spectra = "Singular values of the layers' updates at the end, relative to the largest of each."
    drawn[spectra] = ("spectra", plot.spectra(run, "at the end"))
    folder = run.folder / "plots"
    folder.mkdir(exist_ok=True)
    for name, figure in drawn.values():
        figure.savefig(folder / f"{name}.png")
    return {caption: folder / f"{name}.png" for caption, (name, _) in drawn.items()}
