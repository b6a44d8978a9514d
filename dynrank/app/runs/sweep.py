"""The runs of a sweep, and their table and picture from the files in the runs' folders."""

import re
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from math import isnan
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.markup import escape

from dynrank.app.console import print_facts
from dynrank.app.runs.command import read_overrides
from dynrank.app.runs.config import complete
from dynrank.app.runs.summary import read_summary
from dynrank.errors import ConfigurationError
from dynrank.output.console import empty_table, print_table
from dynrank.output.whole_file import whole_file

TABLE = "sweep.csv"
PICTURE = "sweep.png"
# Runs that differ only in these overrides have the same setting.
_REPEATED = ("seed", "ckpt_path")


def show_sweep(folder: Path) -> None:
    """Print the table of the sweep in ``folder``, and write sweep.csv and sweep.png there; name runs without result.

    A row has the means of the runs that differ only in their seeds, and the sample deviations (``_sd``), in the order
    of the runs' numbers. Without matplotlib there is no picture.
    """
    # --help must not wait for this import.
    import pandas as pd

    given: list[dict[str, str]] = []
    results: list[dict[str, float]] = []
    lacking = []
    for run in _runs(folder):
        overrides = read_overrides(run) or []
        given.append({key: value for key, _, value in (text.lstrip("+~").partition("=") for text in overrides)})
        try:
            results.append(_results(run))
        # One broken file must not hide the other runs.
        except ConfigurationError as error:
            results.append({})
            lacking.append(f"{run} ({' '.join(overrides)}): {' '.join(str(error).split())}")
    names = list(dict.fromkeys(name for result in results for name in result))
    if names:
        settings = pd.DataFrame(given).fillna("")
        keys = [key for key in settings if key not in _REPEATED and settings[key].nunique() > 1]
        runs = pd.concat([settings[keys], pd.DataFrame(results)], axis=1)
        arms = runs.groupby(keys or (lambda _: ""), sort=False)
        # A run that has ended has this result.
        columns = {"runs": arms["adapter_parameters"].count()}
        for name in names:
            columns |= {name: arms[name].mean(), f"{name}_sd": arms[name].std()}
        table = pd.DataFrame(columns)
        shown = [name for name in names if not name.startswith("final/")]
        _print_table(table.reset_index().to_dict("records"), keys, shown)
        with whole_file(folder / TABLE) as part:
            table.to_csv(part, index=bool(keys))
        print_facts({"table": folder / TABLE})
        if find_spec("matplotlib") is not None:
            from dynrank import plot

            panels = {name: [arm[name].dropna().tolist() for _, arm in arms] for name in shown}
            plot.arms([list(setting) for setting, _ in arms], ", ".join(keys), panels).savefig(folder / PICTURE)
            print_facts({"plot": folder / PICTURE})
    for fault in lacking:
        print_facts({"no result": fault})


def _runs(folder: Path) -> list[Path]:
    """The folders of the runs, in the order of their numbers."""
    found = [file.parents[1] for file in folder.rglob(".hydra/overrides.yaml")]
    if not found:
        raise ConfigurationError(f"{str(folder)!r} must be the folder of a sweep (hydra.sweep.dir); it holds no run")
    return sorted(found, key=lambda run: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", str(run))])


def _results(folder: Path) -> dict[str, float]:
    """The metrics of the test and of other data (``final/…``), what the run has measured, and the adapter's size."""
    summary = read_summary(folder)
    results = {**summary.test, **{f"final/{name}": value for name, value in summary.final.items()}}
    results |= {} if summary.gap is None else {"gap": summary.gap}
    results |= {"adapter_parameters": summary.parameters["adapter"], "tokens_per_second": summary.tokens_per_second}
    return {**results, "peak_memory_bytes": summary.peak_memory_bytes}


def _print_table(rows: Sequence[dict[str, Any]], keys: Sequence[str], names: Sequence[str]) -> None:
    table = empty_table("mean ± standard deviation of runs that differ only in their seeds", *keys, "runs", *names)
    for row in rows:
        cells = []
        for name in names:
            digits = ",.4f" if abs(row[name]) < 1000 else ",.0f"
            spread = f" ± {row[f'{name}_sd']:{digits}}" if row[f"{name}_sd"] > 0 else ""
            cells.append("-" if isnan(row[name]) else f"{row[name]:{digits}}{spread}")
        # A value such as [query,value] must not be read as markup.
        table.add_row(*(escape(row[key]) for key in keys), f"{row['runs']}", *cells)
    print_table(table)


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
