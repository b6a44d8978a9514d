"""Does starting high and dropping pay? medical_terms at ranks 16 to 2: fixed, squeezed, dropped, annealed, AdaLoRA.

Every arm is trained at each of four learning rates on the first seed, and on the others at the rate of its best
validation loss there; then, at that rate, once more on all seeds for as many steps as fit into the time that rank 16
takes (steps / measured step time, which is taken first, all models interleaved in one process), unless these are as
many to a hundredth. Batches, dropout, head and scaling are the same in all arms of a seed. Arms that start at rank 16
go on from one model up to their first change.

Writes study.csv (a row per run), study_cost.csv (step times) and study.png into scripts/results/, and prints the
tables. It may be interrupted: runs that the files hold already are not made again.
Run: .venv/bin/python scripts/study.py [--seeds N] [--steps N] [--processes N] [OVERRIDE ...]
"""

from __future__ import annotations

import argparse
import multiprocessing
import signal
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise, product
from math import inf, isfinite
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from compare_adalora import adalora, allocation_of, kept_parameters
from matplotlib.figure import Figure
from measuring import ratio, rounds
from medical_bench import (
    RESULTS,
    Diverged,
    Setting,
    Table,
    Trainee,
    adapted,
    adapter_parameters,
    budget_ranks,
    values,
)
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as Printed

from dynrank import lora_layers, resize
from dynrank.change.measuring import Moments
from dynrank.driver.rewarmup import Rewarmup
from dynrank.schedules import How
from dynrank.targets import Budget

RATES = (5e-4, 1e-3, 2e-3, 4e-3)
HIGH, WINDOW = 16, 20  # steps that a budget is measured over, and of the ramp after a change: the presets' values
STEPS, TIME = "steps", "time"  # what is equal in a comparison
FIELDS = (
    *("equal", "seed", "arm", "lr", "steps", "parameters", "bytes"),
    *("spike", "val_loss", "test_loss", "test_accuracy"),
)
KEYS = ("equal", "seed", "arm", "lr")
Row = dict[str, object]


@dataclass(frozen=True)
class Arm:
    """A schedule of ranks.

    Attributes:
        start: rank of the first step.
        changes: (share of the run, rank whose parameters are left then).
        shared: these are shared out among the layers by estimated loss, not cut to that rank everywhere by weight.
        adalora: PEFT's AdaLoRA goes to the rank instead, from 0.15 to 0.65 of the run.
    """

    start: int = HIGH
    changes: tuple[tuple[float, int], ...] = ()
    shared: bool = False
    adalora: bool = False

    def __str__(self) -> str:
        if self.adalora:
            return f"AdaLoRA {self.start} → {self.final}"
        ranks = " → ".join(map(str, [self.start, *(rank for _, rank in self.changes)]))
        if not self.changes:
            return f"rank {ranks}"
        times = ", ".join(f"{share:g}" for share, _ in self.changes)
        when = "after the end" if self.changes[0][0] == 1 else f"at {times}"
        return f"{ranks} {when}{', budget' if self.shared else ''}"

    @property
    def final(self) -> int:
        return self.changes[-1][1] if self.changes else self.start

    def segments(self) -> Iterator[tuple[float, str]]:
        """(share of the run, model as in :func:`cost_models`)."""
        points = [(0.0, self.start), *self.changes, (1.0, 0)]
        for (begin, rank), (end, _) in pairwise(points):
            yield end - begin, f"AdaLoRA {self.final}" if self.adalora else f"rank {rank}"


ANNEAL = ((0.2, 8), (0.5, 4), (0.8, 2))
ARMS = [
    *(Arm(start=rank) for rank in (2, 4, 8, HIGH)),
    Arm(changes=((1.0, 4),)),  # post-squeeze
    Arm(changes=((0.9, 4),)),  # squeeze, then tune
    *(Arm(changes=((share, low),), shared=by) for low in (4, 2) for share in (0.5, 0.75) for by in (False, True)),
    *(Arm(changes=ANNEAL, shared=by) for by in (False, True)),
    *(Arm(changes=((0.65, low),), adalora=True) for low in (4, 2)),
]


Run = tuple[str, int, Arm, float, int]  # what is equal, seed, arm, learning rate, steps


@dataclass(frozen=True)
class Unit:
    """What one process does in one go: arms of one seed, rate and length that start alike."""

    equal: str
    seed: int
    lr: float
    steps: int
    arms: tuple[Arm, ...]
    overrides: tuple[str, ...] = ()

    @property
    def setting(self) -> Setting:
        return _setting(self.seed, self.steps, self.overrides)


@dataclass(frozen=True)
class Point:
    """A model at a change: its validation loss before, and the statistics that a budget needs."""

    val_loss: float
    measured: Moments


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40, help="in which step times are measured")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files and the plot")
    parser.add_argument("overrides", nargs="*", help="of the configuration, such as task.model=FOLDER")
    options = parser.parse_args(arguments)
    table, seeds = Table(options.out / "study.csv", FIELDS, KEYS), range(options.seeds)
    cost = step_costs(options.out / "study_cost.csv", options.rounds, tuple(options.overrides))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=context, initializer=_leave_interrupts) as pool:

        def train(title: str, runs: Iterable[Run]) -> None:
            run_all(pool, units(table, runs, tuple(options.overrides)), table, title)

        train("learning rates", [(STEPS, 0, arm, lr, options.steps) for lr in RATES for arm in ARMS])
        best = {arm: best_rate(table, arm) for arm in ARMS}
        train("seeds", [(STEPS, seed, arm, best[arm], options.steps) for seed in seeds for arm in ARMS])
        length = {arm: round(options.steps / sum(share * cost[name] for share, name in arm.segments())) for arm in ARMS}
        alike = {arm for arm in ARMS if abs(length[arm] - options.steps) <= options.steps / 100}
        for arm, seed in product(alike, seeds):
            row = table.find(STEPS, seed, arm, best[arm])
            if row is not None and table.lacks(TIME, seed, arm, best[arm]):
                table.add({**row, "equal": TIME})
        train("equal time", [(TIME, seed, arm, best[arm], length[arm]) for seed in seeds for arm in ARMS])
    for equal in (STEPS, TIME):
        show(table, equal, best)
    draw(table, best, options.out / "study.png")


def units(table: Table, runs: Iterable[Run], overrides: tuple[str, ...]) -> list[Unit]:
    """The runs that the table lacks; those with a common start together."""
    groups: dict[tuple[object, ...], Unit] = {}
    for equal, seed, arm, lr, steps in runs:
        if table.lacks(equal, seed, str(arm), lr):
            alike = (equal, seed, lr, steps, arm if arm.adalora else arm.start)
            before = groups.get(alike, Unit(equal, seed, lr, steps, (), overrides))
            groups[alike] = replace(before, arms=(*before.arms, arm))
    return sorted(groups.values(), key=lambda unit: -len(unit.arms))  # the long ones first: processes end together


def run_all(pool: Executor, todo: Sequence[Unit], table: Table, title: str) -> None:
    """Train the units in the processes of ``pool``; each is in the table when it is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("runs"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        bar = progress.add_task(title, total=sum(len(unit.arms) for unit in todo))
        try:
            for done in as_completed([pool.submit(rows_of, unit) for unit in todo]):
                for row in done.result():
                    table.add(row)
                    progress.advance(bar)
        except BaseException:  # what is under way would take minutes, and is made again
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _leave_interrupts() -> None:
    """Ctrl-C goes to all processes of a terminal; the first one ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@lru_cache(maxsize=2)
def _setting(seed: int, steps: int, overrides: tuple[str, ...]) -> Setting:
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)  # peft on transformers 5
    return Setting(seed, steps, overrides)


def rows_of(unit: Unit) -> list[Row]:
    """Train the arms of a unit; the losses of what diverges are infinite."""
    torch.set_num_threads(1)  # small products: a second thread mostly spins
    setting = unit.setting
    if unit.arms[0].adalora:
        return [_row(unit, arm, _adalora(setting, unit.lr, arm)) for arm in unit.arms]
    trunk, rows = adapted(setting, unit.arms[0].start, unit.lr), []
    firsts = {arm: round(arm.changes[0][0] * unit.steps) if arm.changes else unit.steps for arm in unit.arms}
    point = None
    for step in sorted(set(firsts.values())):
        try:
            point = advance(trunk, step)
        except Diverged:
            point = None
        for arm in (arm for arm, first in firsts.items() if first == step):
            rows.append(_row(unit, arm, None if point is None else finish(deepcopy(trunk), arm, point)))
    return rows


def advance(trainee: Trainee, step: int) -> Point:
    """Train up to ``step``, measuring the last steps before it."""
    trainee.train(max(trainee.done, step - WINDOW))
    with closing(Moments(dict(lora_layers(trainee.model)), WINDOW)) as measured:
        trainee.train(step, after_step=lambda _: measured.end_step())
    return Point(trainee.evaluate(trainee.setting.val)[0], measured)


def finish(trainee: Trainee, arm: Arm, point: Point) -> tuple[Trainee, float | None] | None:
    """Make the changes of ``arm``, the first at ``point``, and train to the end; with the largest rise of the loss."""
    steps, rises = trainee.setting.steps, []
    per_rank = adapter_parameters(trainee.model) // arm.start
    try:
        for share, rank in arm.changes:
            if rises:
                point = advance(trainee, round(share * steps))
            ranks: Any = rank
            how = How(metric="loss" if arm.shared else "weight")
            if arm.shared:
                ranks = budget_ranks(trainee.model, Budget(parameters=rank * per_rank), how, point.measured)
            resize(trainee.model, ranks, optimizers=[trainee.optimizer], how=how, measured=point.measured)
            Rewarmup(trainee.optimizer, WINDOW)
            rises.append(trainee.evaluate(trainee.setting.val)[0] / point.val_loss - 1)
        trainee.train(steps)
    except Diverged:
        return None
    return trainee, max(rises, default=None)


def _adalora(setting: Setting, lr: float, arm: Arm) -> tuple[Trainee, None] | None:
    first, last = round(0.15 * setting.steps), round(arm.changes[0][0] * setting.steps)
    trainee = adalora(setting, lr, first=first, last=last, target=arm.final)
    try:
        trainee.train(setting.steps, allocation_of(trainee))
    except Diverged:
        return None
    return trainee, None


def _row(unit: Unit, arm: Arm, trained: tuple[Trainee, float | None] | None) -> Row:
    row: Row = {"equal": unit.equal, "seed": unit.seed, "arm": str(arm), "lr": unit.lr, "steps": unit.steps}
    if trained is None:
        row |= {"parameters": "", "bytes": "", "spike": ""}
        return row | {"val_loss": inf, "test_loss": inf, "test_accuracy": 0.0}
    trainee, spike = trained
    count = kept_parameters(trainee.model) if arm.adalora else adapter_parameters(trainee.model)
    row |= {"parameters": count, "bytes": 4 * count, "spike": "" if spike is None else spike}
    val_loss, _ = trainee.evaluate(trainee.setting.val)
    test_loss, accuracy = trainee.evaluate(trainee.setting.test)
    return row | {"val_loss": val_loss, "test_loss": test_loss, "test_accuracy": accuracy}


def best_rate(table: Table, arm: Arm) -> float:
    """The learning rate with the lowest validation loss on the first seed."""
    return min(RATES, key=lambda lr: values(table.rows, "val_loss", equal=STEPS, seed=0, arm=arm, lr=lr)[0])


def step_costs(file: Path, count: int, overrides: tuple[str, ...]) -> dict[str, float]:
    """Step times to that of rank 16, medians of interleaved rounds; measured if ``file`` does not hold them."""
    table = Table(file, ("model", "step_ratio", "quartiles"), ("model",))
    if not table.rows:
        torch.set_num_threads(1)
        setting = _setting(0, count + 4, overrides)
        models = {f"rank {rank}": adapted(setting, rank) for rank in (HIGH, 8, 4, 2)}
        models |= {f"AdaLoRA {low}": adalora(setting, None, first=1, last=count, target=low) for low in (4, 2)}
        hooks = {name: allocation_of(trainee) for name, trainee in models.items() if "AdaLoRA" in name}
        steps = {
            name: lambda name=name, trainee=trainee: trainee.train(trainee.done + 1, hooks.get(name))
            for name, trainee in models.items()
        }
        seconds = rounds(steps, count)
        for name in models:
            median, quartiles = ratio(seconds[name], seconds[f"rank {HIGH}"])
            table.add({"model": name, "step_ratio": median, "quartiles": quartiles})
    return {row["model"]: float(row["step_ratio"]) for row in table.rows}


def show(table: Table, equal: str, best: dict[Arm, float]) -> None:
    """Each arm at its best rate, means over seeds, and its distance to the fixed rank that it ends at."""
    rows = [row for row in table.rows if row["equal"] == equal]
    printed = Printed(title=f"medical_terms, equal {equal}, {len({row['seed'] for row in rows})} seeds, best rates")
    names = ("arm", "lr", "steps", "bytes", "spike", "test loss (sd)", "less the fixed rank's, by seed", "accuracy")
    for column in names:
        printed.add_column(column, justify="left" if column == "arm" else "right")
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == str(arm) and row["lr"] == f"{best[arm]:.6g}"]
        fixed = Arm(start=arm.final)
        rival = values(rows, "test_loss", arm=fixed, lr=f"{best[fixed]:.6g}")
        loss, accuracy = values(mine, "test_loss"), values(mine, "test_accuracy")
        spikes = [float(row["spike"]) for row in mine if row["spike"]]
        sizes = [float(row["bytes"]) for row in mine if row["bytes"]]
        printed.add_row(
            str(arm),
            f"{best[arm]:g}",
            mine[0]["steps"],
            f"{mean(sizes):,.0f}" if sizes else "",
            f"{mean(spikes):+.1%}" if spikes else "",
            f"{mean(loss):.3f}" + (f" ({stdev(loss):.3f})" if len(loss) > 1 and all(map(isfinite, loss)) else ""),
            "" if arm == fixed else " ".join(f"{a - b:+.3f}" for a, b in zip(loss, rival, strict=True)),
            f"{mean(accuracy):.1%}",
        )
    Console(width=150).print(printed)


def draw(table: Table, best: dict[Arm, float], file: Path) -> None:
    """Test loss of each arm in both comparisons, a dot per seed; and against the bytes that are deployed."""
    figure = Figure(figsize=(14, 6.5), layout="constrained")
    arms, sizes = figure.subplots(1, 2, width_ratios=(3, 2))
    names = [str(arm) for arm in ARMS][::-1]
    fixed: list[tuple[float, float]] = []
    for arm in ARMS:
        height = names.index(str(arm))
        for equal, color, shift in ((STEPS, "tab:blue", 0.12), (TIME, "tab:orange", -0.12)):
            mine = [r for r in table.rows if (r["equal"], r["arm"], r["lr"]) == (equal, str(arm), f"{best[arm]:.6g}")]
            losses = [loss for loss in values(mine, "test_loss") if isfinite(loss)]
            if not losses:
                continue
            label = f"equal {equal}" if height == 0 else None
            arms.plot(losses, [height + shift] * len(losses), "o", color=color, alpha=0.5, label=label)
            arms.plot([mean(losses)], [height + shift], "|", color="black", markersize=12)
            if equal == STEPS:
                spread = stdev(losses) if len(losses) > 1 else 0.0
                size = mean(float(row["bytes"]) for row in mine if row["bytes"]) / 1e6
                kind = "AdaLoRA" if arm.adalora else "budget" if arm.shared else "uniform" if arm.changes else "fixed"
                style = {"AdaLoRA": "s", "budget": "^", "uniform": "v", "fixed": "o"}[kind]
                colors = {"AdaLoRA": "tab:red", "budget": "tab:green", "uniform": "tab:purple", "fixed": "black"}
                first = kind not in sizes.get_legend_handles_labels()[1]
                line: Any = {"fmt": style, "color": colors[kind], "label": kind if first else None, "alpha": 0.7}
                sizes.errorbar([size], [mean(losses)], [spread], **line)
                if kind == "fixed":
                    fixed.append((size, mean(losses)))
    sizes.plot(*zip(*fixed, strict=True), color="black", linewidth=0.8)
    arms.set_yticks(range(len(names)), names)
    arms.set(xlabel="test loss; dots: seeds, bars: means")
    sizes.set(xscale="log", xlabel="adapter, MB in float32", ylabel="test loss, equal steps, mean and sd")
    for axes in (arms, sizes):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle("medical_terms: each arm at its best learning rate")
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: start it again to go on")
        raise SystemExit(130) from None
