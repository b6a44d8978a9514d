"""The runs of a sweep, and their table and picture from the files in the runs' folders."""

import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from math import isnan
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.markup import escape
from rich.table import Table

from dynrank.app.console import print_facts
from dynrank.app.runs.command import read_overrides
from dynrank.app.runs.config import complete
from dynrank.app.runs.folder import HISTORY
from dynrank.app.runs.summary import SUMMARY, Summary, read_summary
from dynrank.errors import ConfigurationError
from dynrank.output.console import empty_table, print_table
from dynrank.output.whole_file import whole_file

TABLE = "sweep.csv"
PICTURE = "sweep.png"
# Runs that differ only in these overrides have the same setting.
_REPEATED = ("seed", "ckpt_path")
# {result: its format} in the table, beside the test metrics.
_FORMATS = {"gap": ".4f", "adapter_parameters": ",.0f", "step_seconds": ".4f"}


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep, as its folder describes it.

    Attributes:
        overrides: {key: value as text} of the overrides that started the run.
        results: metrics of the test and of other data (``final/…``), the gap, the adapter's size, bytes and the seconds
            of a step, as far as summary.json has them; empty if the run has not ended.
        fault: why the run has no results.
    """

    folder: Path
    overrides: dict[str, str]
    results: dict[str, float]
    fault: str | None = None


def read_sweep(folder: Path) -> list[SweepRun]:
    """The runs of the sweep in ``folder``, in the order of their numbers, without those that were refused."""
    folders = [file.parents[1] for file in folder.rglob(".hydra/overrides.yaml")]
    found = [run for run in folders if any((run / name).exists() for name in (SUMMARY, HISTORY))]
    if not found:
        raise ConfigurationError(f"{str(folder)!r} must be the folder of a sweep (hydra.sweep.dir); it holds no run")
    return [_read_run(run) for run in sorted(found, key=_order)]


def show_sweep(folder: Path) -> None:
    """Print the table of the sweep in ``folder``, and write sweep.csv and sweep.png there; name runs without result.

    Without matplotlib there is no picture.
    """
    runs = read_sweep(folder)
    names = list(dict.fromkeys(name for run in runs for name in run.results))
    if names:
        keys, arms, table = _arms(runs, names)
        print_table(_shown_table(table, keys, names))
        with whole_file(folder / TABLE) as part:
            table.to_csv(part, index=bool(keys))
        print_facts({"table": folder / TABLE})
        if find_spec("matplotlib") is not None:
            _draw(folder / PICTURE, arms, keys, names)
            print_facts({"plot": folder / PICTURE})
    for run in runs:
        if run.fault is not None:
            given = " ".join(f"{key}={value}" for key, value in run.overrides.items())
            print_facts({"no result": f"{run.folder} ({given}): {run.fault}"})


def _arms(runs: Sequence[SweepRun], names: Sequence[str]) -> tuple[list[str], Any, Any]:
    """The overrides that differ between runs but for the seed, the runs' results grouped by them, and the table.

    Groups ascend if all values are numbers. The table has the means and sample deviations of the results ``names``.
    """
    # --help must not wait for this import.
    import pandas as pd

    given = pd.DataFrame([run.overrides for run in runs]).fillna("")
    keys = [key for key in given if key not in _REPEATED and given[key].nunique() > 1]
    results = pd.DataFrame([{**run.results, "ended": run.fault is None} for run in runs])
    frame = pd.concat([given[keys], results], axis=1)
    with suppress(ValueError):
        frame = frame.sort_values(keys, key=pd.to_numeric, kind="stable")
    arms = frame.groupby(keys or (lambda _: ""), sort=False)
    mean = arms[names].mean()
    deviation = arms[names].std()
    ended = arms["ended"].sum()
    columns = {"runs": ended, "without_result": arms.size() - ended}
    for name in names:
        columns |= {name: mean[name], f"{name}_sd": deviation[name]}
    return keys, arms, pd.DataFrame(columns)


def _read_run(folder: Path) -> SweepRun:
    pairs = (text.lstrip("+~").partition("=") for text in read_overrides(folder) or ())
    overrides = {key: value for key, _, value in pairs}
    if not (folder / SUMMARY).exists():
        return SweepRun(folder, overrides, {}, "has not ended")
    try:
        return SweepRun(folder, overrides, _results(read_summary(folder)))
    # One broken file must not hide the other runs.
    except ConfigurationError as error:
        return SweepRun(folder, overrides, {}, " ".join(str(error).split()))


def _results(summary: Summary) -> dict[str, float]:
    final = {f"final/{name}": value for name, value in summary.final.items()}
    held = {f"{part.removesuffix('s')}_bytes": count for part, count in summary.bytes.items()}
    one = {"gap": summary.gap, "adapter_parameters": summary.parameters["adapter"], **held}
    results = {**summary.test, **final, **one, "step_seconds": summary.step_seconds}
    return {name: float(value) for name, value in results.items() if value is not None}


def _order(folder: Path) -> list[str | int]:
    """Sort key that orders numbers in a path by value."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(folder))]


def _shown(names: Sequence[str]) -> dict[str, str]:
    """{name: heading} of the results of ``names`` in the table."""
    shown = {name: name.replace("_", " ") for name in names if name in _FORMATS}
    return {name: name for name in names if name.startswith("test/")} | shown


def _shown_table(table: Any, keys: Sequence[str], names: Sequence[str]) -> Table:
    shown = _shown(names)
    title = "mean ± standard deviation over seeds" if (table.runs > 1).any() else "runs of the sweep"
    made = empty_table(title, *keys, "runs", *shown.values())
    for row in table.reset_index().to_dict("records"):
        runs = row["runs"] + row["without_result"]
        count = f"{runs}" if row["runs"] == runs else f"{row['runs']} of {runs}"
        # A value such as [query,value] must not be read as markup.
        made.add_row(*(escape(row[key]) for key in keys), count, *(_cell(row, name) for name in shown))
    return made


def _cell(row: Mapping[str, Any], name: str) -> str:
    digits = _FORMATS.get(name, ".4f")
    if isnan(row[name]):
        return "-"
    # Parameters are the same for every seed, so they have no spread.
    return f"{row[name]:{digits}}" + (f" ± {row[f'{name}_sd']:{digits}}" if row[f"{name}_sd"] > 0 else "")


def _draw(file: Path, arms: Any, keys: Sequence[str], names: Sequence[str]) -> None:
    # matplotlib is an optional dependency.
    from dynrank import plot

    shown = _shown(names)
    # The ranks decide it, so a panel of it would say nothing of the runs.
    shown.pop("adapter_parameters", None)
    panels = {heading: [arm[name].dropna().tolist() for _, arm in arms] for name, heading in shown.items()}
    plot.arms([list(setting) for setting, _ in arms], ", ".join(keys), panels).savefig(file)


def run_in_sweep(
    config: DictConfig, overrides: Sequence[str], folder: Path, record: Callable[[], None]
) -> float | None:
    """Make the run of ``config`` and its ``overrides`` in ``folder``; returns its ``objective`` at the final weights.

    ``record`` writes what Hydra was called with into the folder.
    """
    # This import loads torch and transformers, which takes seconds.
    from dynrank.app.runs.job import run

    try:
        complete(config, overrides)
        summary = run(config, folder, sweep=True, record=record)
        # A run without a test (trainer.limit_test_batches=0) has measured nothing.
        return None if config.objective is None else summary.final.get(config.objective)
    except Exception as error:
        # Hydra raises only the first error of a sweep, after all runs.
        print(f"no result        {folder}: {type(error).__name__}: {error}", file=sys.stderr)
        if not isinstance(error, ConfigurationError):
            traceback.print_exception(error)
        raise


class SweepTable(Callback):
    """Says at the start of a sweep how to get its table, and prints the table at the end.

    Hydra calls the end only if no run has failed.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        folder = config.hydra.sweep.dir
        print_facts({"sweep": f"{folder}; the table of the runs so far, also if one fails: dynrank sweep {folder}"})

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        show_sweep(Path(config.hydra.sweep.dir))
