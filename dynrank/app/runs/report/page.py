"""The page of a finished run, which needs no other file, no script and no network, and the README.md of its adapter."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from dynrank import __version__
from dynrank.adapters.sidecar_files import label_names, read_inputs
from dynrank.app.console import one_line
from dynrank.app.runs.folder import REPORT
from dynrank.app.runs.report.record import RunRecord, read_run
from dynrank.app.runs.summary import Summary, read_summary, results_of
from dynrank.errors import ConfigurationError
from dynrank.layers.finding import lora_layers
from dynrank.output.console import span
from dynrank.output.ranks import layer_kinds
from dynrank.output.slots import slot_rank
from dynrank.output.whole_file import whole_file
from dynrank.private import source_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_report(folder: Path, against: Sequence[Path] = ()) -> Path:
    """Write ``report.html`` of the run in ``folder`` from its files, and pictures into ``plots/``; returns the page.

    Without matplotlib the page has no pictures, and says so. It compares the run with those in the folders ``against``.
    """
    run = read_run(folder)
    results = results_of(run.summary)
    rivals = [results_of(read_summary(other)) for other in against]
    file = folder / REPORT
    try:
        page = template("page.html.jinja").render(
            run=run,
            title=f"dynrank run {_run_name(folder)}",
            results={"steps": f"{run.last_step:,}"} | results,
            compared=_compared([results, *rivals]),
            rivals=[_run_name(other) for other in against],
            pictures=_draw(run),
            ranks=run.ranks(),
            version=__version__,
        )
        with whole_file(file) as part:
            part.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"cannot write {str(file)!r}: {error.strerror or error}") from None
    return file


def write_card(folder: Path, model: Any, summary: Summary, steps: int, command: str | None) -> None:
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
        steps=steps,
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


def _run_name(folder: Path) -> str:
    """The last two parts of the path: the date and the time for a run without a name."""
    return "/".join(folder.resolve().parts[-2:])


def _compared(runs: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """{name: its value in each of ``runs``}; "–" means not measured."""
    names = dict.fromkeys(name for results in runs for name in results)
    return {name: [results.get(name, "–") for results in runs] for name in names}


def _draw(run: RunRecord) -> dict[str, Path]:
    """Write the pictures of ``run``; returns {caption: PNG file} for the page, empty without matplotlib."""
    if find_spec("matplotlib") is None:
        return {}
    folder = run.folder / "plots"
    folder.mkdir(exist_ok=True)
    pictures = {}
    for name, caption, figure in _figures(run):
        figure.savefig(folder / f"{name}.png")
        pictures[caption] = folder / f"{name}.png"
    return pictures


def _figures(run: RunRecord) -> Iterator[tuple[str, str, Figure]]:
    """(name of the file, caption, figure) of each picture."""
    # matplotlib is an optional dependency.
    from dynrank import plot

    over = f"over {run.last_step:,} optimizer steps"
    # A run that was resumed at its last step has no losses.
    if run.metrics.keys() & {"train/loss", "val/loss"}:
        caption = (
            f"Training and validation loss {over}; dashed: ranks change. Training loss is of one batch before its "
            "step, with the dropout and label smoothing that are set."
        )
        yield "loss", caption, plot.loss(run)
    quality = {name: run.metrics[name] for name in run.metrics if name.startswith("val/") and name != "val/loss"}
    if quality:
        yield "quality", f"In validation {over}: {', '.join(quality)}.", plot.quality(quality, run.change_texts())
    caption = (
        f"Ranks of {len(run.layers)} layers, the first → the last: a row for each block, a column for each kind of "
        "layer."
    )
    yield "ranks", caption, plot.ranks(run)
    caption = f"Singular values of {len(run.layers)} updates at the end, relative to the largest of each."
    yield "spectra", caption, plot.spectra(run, "at the end")
