"""The files of a finished run, read for its report."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import yaml
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked_dataclass

from dynrank.adapters.squeeze import LayerSpectrum, inspect
from dynrank.app.runs.command import read_overrides
from dynrank.app.runs.folder import CONFIG, HISTORY, METRICS
from dynrank.app.runs.summary import Summary, read_summary
from dynrank.errors import ConfigurationError
from dynrank.output.console import span

if TYPE_CHECKING:
    from dynrank.plot import Series


# This is not strict, because the cells of a CSV file are texts. The report ignores other columns.
@checked_dataclass(frozen=True, config=ConfigDict(extra="ignore"))
class LayerChange:
    """A row of rank_history.csv: one layer in one change."""

    step: int
    layer: str
    rank_before: int
    rank_after: int
    reason: str
    importance: float | Literal[""] = ""
    importance_error: float | Literal[""] = ""


@dataclass(frozen=True)
class RecordedChange:
    """The rows of rank_history.csv of one change of ranks, which may have been undone.

    Attributes:
        step: optimizer steps made before the change.
        reason: why the change was made, or why it was undone.
        undone: whether it was undone, as summary.json says.
        layers: {layer: its row}.
        lr_factor: factor of the adapters' rate from there on, as summary.json says.
    """

    step: int
    reason: str
    undone: bool
    layers: dict[str, LayerChange] = field(default_factory=dict)
    lr_factor: float = 1.0

    @property
    def ranks(self) -> str:
        """``32 → 16``, or ranges if layers differ."""
        before, after = ({getattr(la, name) for la in self.layers.values()} for name in ("rank_before", "rank_after"))
        return f"{span(before)} → {span(after)}"


@dataclass(frozen=True, repr=False)
class RunRecord:
    """A finished run, as the files in its folder describe it.

    Attributes:
        folder: the folder of the run.
        config: the whole configuration, ``config["lora"]["rank"]``. References such as ``${lora.rank}`` stand as they
            are written; ``OmegaConf.create(run.config)`` follows them.
        yaml: the same as the text of the file.
        overrides: those of the command line; None: not recorded.
        summary: the contents of summary.json: test metrics, final ranks, parameters, seconds, …
        metrics: {metric: (optimizer steps, values)}, for example ``metrics["val/loss"]``.
        last_step: optimizer steps made.
        history: all changes of rank in the order of time, also those that were undone.
        layers: {layer of the exported adapter: its spectrum}, in the order of the model.
    """

    folder: Path
    config: dict[str, Any]
    yaml: str
    overrides: list[str] | None
    summary: Summary
    metrics: dict[str, Series]
    last_step: int
    history: list[RecordedChange]
    layers: dict[str, LayerSpectrum]

    def __repr__(self) -> str:
        ended = {"rank": span(self.summary.final_ranks.values()), **self.summary.test}
        results = ", ".join(
            f"{name} {value if isinstance(value, str) else f'{value:.4g}'}" for name, value in ended.items()
        )
        return f"<run {str(self.folder)!r}: {self.last_step:,} steps, {results}>"

    @property
    def made(self) -> list[RecordedChange]:
        """The changes that were not undone."""
        return [change for change in self.history if not change.undone]

    def change_texts(self) -> dict[int, str]:
        """{optimizer step: ``rank 32 → 16``} of the changes that were not undone, for pictures."""
        return {change.step: f"rank {change.ranks}" for change in self.made}

    def ranks(self) -> dict[str, list[int]]:
        """{layer: its successive ranks}, with the one at the start."""
        ranks = {}
        for name, last in self.summary.final_ranks.items():
            own = [change.layers[name] for change in self.made if name in change.layers]
            ranks[name] = [own[0].rank_before if own else last, *(change.rank_after for change in own)]
        return ranks

    def importance(self) -> dict[str, tuple[float, float]]:
        """{layer: (its importance before its last change, the standard error)}, where that is known."""
        return {
            layer.layer: (layer.importance, layer.importance_error)
            for change in self.history
            for layer in change.layers.values()
            if layer.importance != "" and layer.importance_error != ""
        }


def read_run(folder: str | Path) -> RunRecord:
    """The record of a run that has ended, from the files in its folder.

    Args:
        folder: folder with summary.json, metrics.csv, rank_history.csv, adapter/ and .hydra/.

    Raises:
        ConfigurationError: if the folder is not that of a finished run.

    Example::

        run = dynrank.read_run("outputs/2026-11-28/12-00-00")
        run.config["lora"]["rank"], run.summary.test, run.ranks()
        [(change.step, change.ranks, change.reason) for change in run.history]
        dynrank.plot.loss(run).savefig("loss.png")
    """
    folder = Path(folder)
    summary = read_summary(folder)
    try:
        config = (folder / CONFIG).read_text(encoding="utf-8")
        history = _changes(folder / HISTORY, summary)
        metrics = read_metrics(folder / METRICS)
    except OSError as error:
        raise ConfigurationError(f"{str(folder)!r} must be the folder of a finished run: {error}") from None
    layers = {layer.layer: layer for layer in inspect(folder / "adapter")}
    # The n-th step has number n - 1 in training, and n in the test after it.
    made = [step + 1 for step in metrics.get("train/loss", ([], []))[0]]
    made += [max(steps) for name, (steps, _) in metrics.items() if name in summary.test]
    return RunRecord(
        folder=folder,
        config=yaml.safe_load(config),
        yaml=config,
        overrides=read_overrides(folder),
        summary=summary,
        metrics=metrics,
        last_step=max([0, *made, *(change.step for change in history)]),
        history=history,
        layers={name: layers[name] for name in summary.final_ranks},
    )


def read_metrics(file: Path) -> dict[str, Series]:
    """{metric: its steps and values} of a run's metrics.csv; metrics without any value are left out."""
    found = {}
    for name, column in pd.read_csv(file, index_col="step").items():
        values = column.dropna()
        # A resumed run repeats the validation after its checkpoint.
        values = values[~values.index.duplicated(keep="last")]
        if len(values):
            found[str(name)] = (values.index.tolist(), values.tolist())
    return found


def _changes(file: Path, summary: Summary) -> list[RecordedChange]:
    known = {(change["step"], change["reason"]): change for change in summary.changes}
    changes: list[RecordedChange] = []
    with file.open(newline="", encoding="utf-8") as opened:
        for row in csv.DictReader(opened):
            cells: dict[str, Any] = dict(row)
            line = LayerChange(**cells)
            last = changes[-1] if changes else None
            if last is None or (last.step, last.reason) != (line.step, line.reason) or line.layer in last.layers:
                change = known.get((line.step, line.reason), {})
                undone = bool(change.get("undone", False))
                # An earlier version did not write the factor.
                factor = float(change.get("lr_factor", 1.0))
                changes.append(RecordedChange(line.step, line.reason, undone, lr_factor=factor))
            changes[-1].layers[line.layer] = line
    return changes
