"""The table and the picture of a sweep, made from what its runs have left in their folders."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml
from rich.markup import escape
from rich.table import Table

from dynrank.errors import ConfigurationError
from dynrank.output.console import table_console

__all__ = ["FAULT", "TABLE", "Arm", "SweepRun", "arms", "columns", "read_sweep", "show_sweep"]

FAULT = "error.txt"  # in the folder of a run that failed: the error in one line, then where it came from
TABLE, PICTURE = "sweep.csv", "sweep.png"
_REPEATED = ("seed", "ckpt_path")  # overrides that make no other setting
_HELD = ("adapter_bytes", "gradient_bytes", "optimizer_bytes")


@dataclass(frozen=True)
class SweepRun:
    """What one run of a sweep says of itself.

    Attributes:
        folder: of the run.
        overrides: that it was started with, as text.
        values: of its test, of other data at the end (``final/…``), ``gap``, ``adapter_parameters``,
            ``adapter_bytes``, ``gradient_bytes``, ``optimizer_bytes`` and ``step_seconds``, as far as its summary.json
            has them; empty if it has not ended.
        fault: why it has no values.
    """

    folder: Path
    overrides: dict[str, str]
    values: dict[str, float]
    fault: str | None = None


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed alone.

    Attributes:
        setting: override -> value, of those that differ between arms.
        runs: all of them, ended or not.
    """

    setting: dict[str, str]
    runs: list[SweepRun]

    @property
    def ended(self) -> list[SweepRun]:
        return [run for run in self.runs if run.fault is None]

    def values(self, name: str) -> list[float]:
        return [run.values[name] for run in self.runs if name in run.values]

    def mean(self, name: str) -> float | None:
        values = self.values(name)
        return fmean(values) if values else None

    def deviation(self, name: str) -> float | None:
        """Standard deviation of the sample; None of fewer than two values."""
        values = self.values(name)
        return stdev(values) if len(values) > 1 else None


def read_sweep(folder: Path) -> list[SweepRun]:
    """Read the runs of the sweep in ``folder``, in the order of their numbers.

    Raises:
        ConfigurationError: if there is none.
    """
    found = sorted((file.parents[1] for file in folder.rglob(".hydra/overrides.yaml")), key=_order)
    if not found:
        raise ConfigurationError(f"{str(folder)!r} must be the folder of a sweep (hydra.sweep.dir); it holds no run")
    return [_read_run(run) for run in found]


def arms(runs: Sequence[SweepRun]) -> list[Arm]:
    """Put runs together whose overrides differ in ``seed`` alone, ascending where all that differs are numbers."""
    keys = list(dict.fromkeys(key for run in runs for key in run.overrides if key not in _REPEATED))
    varied = [key for key in keys if len({run.overrides.get(key) for run in runs}) > 1]
    members: dict[tuple[str, ...], list[SweepRun]] = {}
    for run in runs:
        members.setdefault(tuple(run.overrides.get(key, "") for key in varied), []).append(run)
    try:
        settings = sorted(members, key=lambda setting: [float(text) for text in setting])
    except ValueError:
        settings = list(members)
    return [Arm(dict(zip(varied, setting, strict=True)), members[setting]) for setting in settings]


def columns(runs: Sequence[SweepRun]) -> list[str]:
    """Names of what any of ``runs`` has a value of."""
    return list(dict.fromkeys(name for run in runs for name in run.values))


def show_sweep(folder: Path, *, plot: bool = True) -> None:
    """Print the table of the sweep in ``folder``, and write sweep.csv and sweep.png there; name runs without result.

    Raises:
        ConfigurationError: if there is no run, or ``plot`` is asked for without matplotlib.
    """
    runs = read_sweep(folder)
    if plot and find_spec("matplotlib") is None:
        raise ConfigurationError("the picture needs matplotlib: pip install 'dynrank[plots]', or add --no-plot")
    made = arms(runs)
    if any(run.values for run in runs):
        table_console().print(_table(made))
        _write(folder / TABLE, made)
        print(f"table            {folder / TABLE}")
        if plot:
            _draw(folder / PICTURE, made)
            print(f"plot             {folder / PICTURE}")
    for run in runs:
        if run.fault is not None:
            given = " ".join(f"{key}={value}" for key, value in run.overrides.items())
            print(f"no result        {run.folder} ({given}): {run.fault}")


def _read_run(folder: Path) -> SweepRun:
    file = folder / "summary.json"
    values: dict[str, float] = {}
    fault: str | None = None
    try:
        values = _values(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        fault = _fault(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # one broken file hides no other run
        fault = f"{file.name} is not what a run writes at its end: {type(error).__name__}: {error!s:.200}"
    return SweepRun(folder, _overrides(folder / ".hydra" / "overrides.yaml"), values, fault)


def _values(summary: Any) -> dict[str, float]:
    values = {**summary["test"], **{f"final/{name}": value for name, value in summary.get("final", {}).items()}}
    values |= {"gap": summary.get("gap"), "adapter_parameters": summary["parameters"]["adapter"]}
    held = summary.get("bytes", {})
    values |= {f"{part}_bytes": held.get(f"{part}s", held.get(part)) for part in ("adapter", "gradient", "optimizer")}
    values["step_seconds"] = summary.get("step_seconds")
    return {name: float(value) for name, value in values.items() if value is not None}


def _fault(folder: Path) -> str:
    try:
        with (folder / FAULT).open(encoding="utf-8") as file:
            return f"failed: {file.readline().strip()}"
    except OSError:
        return "has not ended"


def _overrides(file: Path) -> dict[str, str]:
    """Key -> value of the task's overrides in a run's .hydra folder.

    Raises:
        ConfigurationError: if the file holds something else.
    """
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{str(file)!r} cannot be read: {error!s:.200}") from None
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ConfigurationError(f"{str(file)!r} must be a list of overrides as Hydra writes it")
    pairs = (text.lstrip("+~").partition("=") for text in found)
    return {key: value for key, _, value in pairs}


def _order(folder: Path) -> list[tuple[int, int, str]]:
    """Numbers in a path by their value."""
    parts = re.split(r"(\d+)", str(folder))
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def _table(made: Sequence[Arm]) -> Table:
    runs = [run for arm in made for run in arm.runs]
    names = columns(runs)
    results = [name for name in names if name.startswith("test/") or name == "gap"]
    held = [name for name in _HELD if name in names]
    table = Table(title="mean ± standard deviation over seeds")
    for heading in (*made[0].setting, "runs", *results, "adapter parameters"):
        table.add_column(heading, justify="right", overflow="fold")
    if held:
        table.add_column("adapter, gradients,\noptimizer: MiB", justify="right")
    if "step_seconds" in names:
        table.add_column("step: ms", justify="right")
    for arm in made:
        cells = [f"{len(arm.ended)}" if len(arm.ended) == len(arm.runs) else f"{len(arm.ended)} of {len(arm.runs)}"]
        cells += [_cell(arm, name, ".4f") for name in results]
        cells.append(_cell(arm, "adapter_parameters", ",.0f"))
        if held:
            cells.append(" + ".join(_mean(arm, name, ",.2f", 2**20) for name in held))
        if "step_seconds" in names:
            cells.append(_cell(arm, "step_seconds", ",.1f", 1e-3))
        table.add_row(*map(escape, arm.setting.values()), *cells)  # [query,value] is no markup
    return table


def _cell(arm: Arm, name: str, digits: str, unit: float = 1) -> str:
    deviation = arm.deviation(name)
    spread = f" ± {deviation / unit:{digits}}" if deviation else ""  # parameters are the same in every seed
    return _mean(arm, name, digits, unit) + spread


def _mean(arm: Arm, name: str, digits: str, unit: float) -> str:
    mean = arm.mean(name)
    return "-" if mean is None else f"{mean / unit:{digits}}"


def _write(file: Path, made: Sequence[Arm]) -> None:
    names = columns([run for arm in made for run in arm.runs])
    part = file.with_name(file.name + ".part")
    with part.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(
            [*made[0].setting, "runs", "without_result", *(n for name in names for n in (name, f"{name}_sd"))]
        )
        for arm in made:
            numbers = [number for name in names for number in (arm.mean(name), arm.deviation(name))]
            ended = len(arm.ended)
            writer.writerow([*arm.setting.values(), ended, len(arm.runs) - ended, *numbers])
    os.replace(part, file)


def _draw(file: Path, made: Sequence[Arm]) -> None:
    from dynrank.output.plots import arms_figure  # matplotlib is an extra

    names = columns([run for arm in made for run in arm.runs])
    panels = {name: [arm.values(name) for arm in made] for name in names if name.startswith("test/")}
    if "gap" in names:
        panels["gap: validation − training loss"] = [arm.values("gap") for arm in made]
    panels["adapter parameters"] = [arm.values("adapter_parameters") for arm in made]
    if set(_HELD) <= set(names):
        panels["MiB of adapter, gradients, optimizer"] = [
            [sum(run.values[name] for name in _HELD) / 2**20 for run in arm.ended if run.values.keys() >= {*_HELD}]
            for arm in made
        ]
    if "step_seconds" in names:
        panels["ms of a step (median)"] = [[1e3 * value for value in arm.values("step_seconds")] for arm in made]
    settings = [list(arm.setting.values()) for arm in made]
    arms_figure(settings, ", ".join(made[0].setting), panels).savefig(file)
