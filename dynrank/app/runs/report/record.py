"""The files of a finished run, read for its report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import yaml

from dynrank.adapters.squeeze import LayerSpectrum, inspect
from dynrank.app.runs.folder import ADAPTER, CONFIG, HISTORY, METRICS
from dynrank.app.runs.summary import Summary, read_summary
from dynrank.output.console import span

if TYPE_CHECKING:
    from dynrank.plot import Series


@dataclass(frozen=True)
class RecordedChange:
    """A change of ranks.

    Attributes:
        step: optimizer steps made before the change.
        reason: why the change was made, or why it was undone.
        undone: whether it was undone.
        lr_factor: factor of the adapters' rate from there on.
        layers: {layer: (its rank before, its rank after)}.
    """

    step: int
    reason: str
    undone: bool
    lr_factor: float
    layers: dict[str, tuple[int, int]]

    @property
    def ranks(self) -> str:
        """``32 → 16``, or ranges if layers differ."""
        return " → ".join(map(span, zip(*self.layers.values(), strict=True)))


@dataclass(frozen=True, repr=False)
class RunRecord:
    """A finished run, as the files in its folder describe it.

    Attributes:
        folder: the folder of the run.
        config: the whole configuration, ``config["lora"]["rank"]``. References such as ``${lora.rank}`` stand as they
            are written; ``OmegaConf.create(run.config)`` follows them.
        summary: the contents of summary.json: test metrics, final ranks, parameters, seconds, …
        metrics: {metric: (optimizer steps, values)}, for example ``metrics["val/loss"]``.
        history: all changes of rank in the order of time, also those that were undone.
        importance: {layer: (its importance before its last change, the standard error)}, where that is known.
        layers: {layer of the exported adapter: its spectrum}, in the order of the model.
    """

    folder: Path
    config: dict[str, Any]
    summary: Summary
    metrics: dict[str, Series]
    history: list[RecordedChange]
    importance: dict[str, tuple[float, float]]
    layers: dict[str, LayerSpectrum]

    def __repr__(self) -> str:
        tested = "".join(f", {name} {value:.4g}" for name, value in self.summary.test.items())
        ranks = span(self.summary.final_ranks.values())
        return f"<run {str(self.folder)!r}: {self.summary.steps:,} steps, rank {ranks}{tested}>"

    def change_texts(self) -> dict[int, str]:
        """{optimizer step: ``rank 32 → 16``} of the changes that were not undone, for pictures."""
        return {change.step: f"rank {change.ranks}" for change in self.history if not change.undone}

    def ranks(self) -> dict[str, list[int]]:
        """{layer: its successive ranks}, with the one at the start."""
        ranks = {}
        for name, last in self.summary.final_ranks.items():
            own = [change.layers[name] for change in self.history if name in change.layers and not change.undone]
            ranks[name] = [own[0][0] if own else last, *(after for _, after in own)]
        return ranks


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
    # A layer may have the name "0" or "NA".
    rows = pd.read_csv(folder / HISTORY, keep_default_na=False, dtype={"layer": str})
    judged = rows[(rows.importance != "") & (rows.importance_error != "")]
    layers = {layer.layer: layer for layer in inspect(folder / ADAPTER)}
    return RunRecord(
        folder=folder,
        config=yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")),
        summary=summary,
        metrics=read_metrics(folder / METRICS),
        history=[_recorded(change, rows) for change in summary.changes],
        importance={row.layer: (float(row.importance), float(row.importance_error)) for row in judged.itertuples()},
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


def _recorded(change: dict[str, Any], rows: pd.DataFrame) -> RecordedChange:
    own = rows[(rows.step == change["step"]) & (rows.reason == change["reason"])]
    layers = {row.layer: (row.rank_before, row.rank_after) for row in own.itertuples()}
    return RecordedChange(change["step"], change["reason"], change["undone"], change.get("lr_factor", 1.0), layers)
