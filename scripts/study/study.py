"""Which way from a high rank to a small adapter pays, at the bytes of ranks 16 to 2?

An arm is one way to train (study_arms.py has all). Arms are: fixed ranks; cuts from rank 16, of every layer alike or as
one budget by weight or by importance, early or late, with and without a higher rate of the adapter
afterwards; cuts in which no layer gets directions that have next to none of its energy; fixed ranks whose rate rises at
the same time; fixed ranks with rsLoRA and LoRA+; allocations from the start, found by a run, by the first gradients
(GoRA) or by the inputs (EVA); AdaLoRA. All arms of a seed have the same batches, dropout and head, and all but rsLoRA
the same scaling.
Arms that start alike go on from one model, which is trained up to their cut. On the first two seeds every arm is
trained at each learning rate, and at a neighbour if the best rate is at the edge. On the other seeds it is trained at
the rate with the best validation loss over these two (a table without these: over all), or at --rates as long as there
is none.

The program adds a row to study.csv as soon as a run ends, draws study_TASK.png (into results/VERSION/), and prints the
table. It may be interrupted: it makes no run again that the file holds. Several programs at once, for other seeds,
tasks or arms, may write to one file. study_bits.py rounds the adapters that --keep saves.
Run: .venv/bin/python scripts/study/study.py [TASK] [--seeds N ...] [--rates R ...] [--only PATTERN] [--minutes M]
"""

from __future__ import annotations

import argparse
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from math import inf, isfinite
from pathlib import Path
from statistics import mean, stdev

import torch
from adalora import adalora, allocation_of, kept_parameters, kept_ranks
from eva import eva, eva_ranks, peft_parameters
from matplotlib.figure import Figure
from study_arms import ADALORA, ARMS, EARLY, GRADUAL, HIGH, Arm
from study_bench import (
    RESULTS,
    SCALING,
    TASKS,
    Diverged,
    Setting,
    Table,
    Trainee,
    adapted,
    adapter_parameters,
    budget_ranks,
    follow,
    gora_ranks,
    kept_adapter,
    start,
    used_ranks,
    values,
    with_error,
)

from dynrank import lora_layers, resize, save_adapter
from dynrank.app.tasks.classification import Classification
from dynrank.driver.learning_rates import LearningRates
from dynrank.importance.importance import Importance, LayerImportance
from dynrank.layers.finding import adapter_parameters as adapter_factors
from dynrank.schedules import How, anneal, auto

FIELDS = ("task", "seed", "arm", "lr", "steps", "parameters", "rise", "val_loss", "test_loss", "test_accuracy", "ranks")
Row = dict[str, object]
# Number of seeds on which an arm's rate is chosen.
CHOOSING = 2


@dataclass(frozen=True)
class Unit:
    """Arms of one task, seed and rate that start alike."""

    task: str
    seed: int
    lr: float
    steps: int
    arms: tuple[Arm, ...]
    overrides: tuple[str, ...]
    # Folder of finished adapters.
    keep: Path | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=TASKS, default="medical_terms")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of a run, instead of the task's")
    parser.add_argument("--rates", type=float, nargs="+", help="instead of the task's, and no neighbours")
    parser.add_argument("--only", default="", metavar="PATTERN", help="arms whose names hold this regular expression")
    parser.add_argument("--minutes", type=float, default=inf, help="begin no run after these")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file and the plot")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="save the adapters that are not PEFT's")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="configuration: task.model=FOLDER")
    options = parser.parse_args(arguments)
    work = TASKS[options.task]
    task = options.task
    arms = [arm for arm in dict.fromkeys(ARMS[task]) if re.search(options.only, str(arm))]
    rates = options.rates or work.rates
    overrides = (*work.overrides, *options.set)
    until = time.monotonic() + 60 * options.minutes
    table = Table(options.out / "study.csv", FIELDS, ("task", "seed", "arm", "lr"))

    def run(seeds: Iterable[int], arms_and_rates: Sequence[tuple[Arm, float]]) -> None:
        missing = [
            Unit(task, seed, lr, options.steps or work.steps, (arm,), overrides, options.keep)
            for seed in seeds
            for arm, lr in arms_and_rates
            if table.lacks(task, seed, str(arm), lr)
        ]
        for unit in alike(missing):
            for row in rows_of(unit, until):
                table.add(row)
                print(", ".join(str(row[name]) for name in ("seed", "arm", "lr", "val_loss", "test_loss")), flush=True)

    # Products are small, so a second thread would mostly wait.
    torch.set_num_threads(1)
    # PEFT on transformers 5 warns of itself.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
    choosing = [seed for seed in options.seeds if seed < CHOOSING]
    run(choosing, [(arm, lr) for lr in rates for arm in arms])
    while not options.rates and (edges := at_an_edge(table, task, arms)) and choosing and time.monotonic() < until:
        run(choosing, edges)
    best = {arm: rate for arm in arms if (rate := best_rate(table, task, arm)) is not None}
    later = [(arm, lr) for arm in arms for lr in ([best[arm]] if arm in best else options.rates or [])]
    run([seed for seed in options.seeds if seed >= CHOOSING], later)
    best = {arm: rate for arm in ARMS[task] if (rate := best_rate(table, task, arm)) is not None}
    rows = [row for row in table.rows if row["task"] == task]
    show(rows, best)
    draw(rows, best, task, options.out / f"study_{task}.png")


def alike(missing: Iterable[Unit]) -> list[Unit]:
    """Units of an arm each, those of a common start put together."""
    units: dict[object, Unit] = {}
    for unit in missing:
        key = (unit.seed, unit.lr, unit.arms[0].trunk or unit.arms)
        before = units.get(key, replace(unit, arms=()))
        units[key] = replace(before, arms=(*before.arms, *unit.arms))
    return [*units.values()]


def rows_of(unit: Unit, until: float) -> Iterator[Row]:
    """Train the arms of a unit; the losses of what diverges are infinite. After the time ``until`` nothing is begun."""
    if time.monotonic() > until:
        return
    setting = Setting(unit.seed, unit.steps, unit.overrides)
    first = unit.arms[0]
    if first.trunk is None:
        yield _row(unit, first, *from_the_start(setting, unit))
        return
    trunk = adapted(setting, first.trunk[0], unit.lr)
    trunk.clip = first.clip
    brought = Importance(dict(lora_layers(trunk.model)))
    diverged = False
    for at in sorted({arm.at for arm in unit.arms}):
        try:
            trunk.train(round(at * unit.steps), after_step=lambda _: brought.end_step())
        except Diverged:
            diverged = True
        for arm in (arm for arm in unit.arms if arm.at == at and time.monotonic() < until):
            yield _row(unit, arm, *((None, "") if diverged else finish(trunk, arm, brought.of_layers(), unit.lr)))


def finish(
    trunk: Trainee, arm: Arm, brought: Mapping[str, LayerImportance], lr: float
) -> tuple[Trainee | None, object]:
    """The arm trained to the end from where ``trunk`` stands, and the rise of the validation loss by its cut."""
    trainee = deepcopy(trunk)
    rise = ""
    layers = {name: layer for name, layer in lora_layers(trainee.model) if not (arm.but and arm.but in name)}
    ranks = dict.fromkeys(layers, arm.rank)
    if arm.by in ("weight", "brought", "found"):
        caps = {} if arm.used is None else used_ranks(layers, arm.used)
        ranks = budget_ranks(layers, arm.rank, arm.highest, None if arm.by == "weight" else brought, caps=caps)
    try:
        if arm.by in ("AdaLoRA's ranks", "AdaLoRA's bytes"):
            ranks = adalora_ranks(trunk.setting, arm.rank)
        if arm.by == "AdaLoRA's bytes":
            parameters = sum(layer.params_per_rank * ranks[name] for name, layer in layers.items())
            ranks = budget_ranks(layers, arm.rank, arm.highest, brought, parameters)
        if arm.is_cut:
            before = trainee.evaluate(trainee.setting.val)[0]
            resize(trainee.model, ranks, optimizers=[trainee.optimizer], balance=True)
            rise = f"{trainee.evaluate(trainee.setting.val)[0] / before - 1:.4f}"
        elif arm.by == "found":
            trainee = with_ranks(trainee.setting, ranks, lr)
            trainee.train(round(arm.at * trainee.setting.steps))
        if arm.rate != 1:
            LearningRates(trainee.optimizer, adapter_factors(trainee.model), arm.rate)
        trainee.train(trainee.setting.steps)
    except Diverged:
        return None, rise
    return trainee, rise


@cache
def adalora_ranks(setting: Setting, rank: int) -> dict[str, int]:
    """The ranks by layer that AdaLoRA ends with."""
    trainee = adalora(setting, HIGH, rank, ADALORA[isinstance(setting.task, Classification)])
    trainee.train(setting.steps, allocation_of(trainee))
    return kept_ranks(trainee.model)


def from_the_start(setting: Setting, unit: Unit) -> tuple[Trainee | None, str]:
    """Train an arm that shares its start with no other; beside it the rise of the loss by the last cut of ``auto``."""
    (arm,) = unit.arms
    lr = unit.lr
    after_step = None
    rise = ""
    how = How(lr_factor="sqrt")
    if arm.by == "AdaLoRA":
        trainee = adalora(setting, HIGH, arm.rank, lr)
        after_step = allocation_of(trainee)
    elif arm.by == "EVA":
        trainee = eva(setting, arm.rank, lr)
    elif arm.by == "GoRA":
        trainee = with_ranks(setting, gora_ranks(setting, arm.rank), lr)
    elif not arm.by or arm.by == "rsLoRA":
        trainee = adapted(setting, arm.rank, lr)
    else:
        trainee = adapted(setting, HIGH, lr)
    if arm.by == "rsLoRA":
        for _, layer in lora_layers(trainee.model):
            # At rank 16 it is the scaling of all arms.
            layer.scaling = SCALING * (HIGH / arm.rank) ** 0.5
    if arm.plus != 1:
        LearningRates(trainee.optimizer, [layer.lora_B for _, layer in lora_layers(trainee.model)], arm.plus)
    try:
        if arm.by == "auto":
            rise = f"{follow(trainee, auto(how=how)):.4f}"
        elif arm.by == "anneal":
            follow(trainee, anneal(arm.rank, how=how, **GRADUAL))
        trainee.train(setting.steps, after_step)
    except Diverged:
        return None, rise
    return trainee, rise


def with_ranks(setting: Setting, ranks: Mapping[str, int], lr: float) -> Trainee:
    """A fresh model with adapters of these ranks."""
    return adapted(setting, HIGH, lr, {name: {"rank": rank} for name, rank in ranks.items()})


def _row(unit: Unit, arm: Arm, trainee: Trainee | None, rise: object) -> Row:
    row: Row = {"task": unit.task, "seed": unit.seed, "arm": str(arm), "lr": unit.lr, "steps": unit.steps, "rise": rise}
    if trainee is None:
        return row | {"parameters": "", "ranks": "", "val_loss": inf, "test_loss": inf, "test_accuracy": 0.0}
    model = trainee.model
    if arm.by == "AdaLoRA":
        count = kept_parameters(model)
        ranks = kept_ranks(model)
    elif arm.by == "EVA":
        count = peft_parameters(model)
        ranks = eva_ranks(model, trainee.setting)
    else:
        count = adapter_parameters(model)
        ranks = {name: layer.rank for name, layer in lora_layers(model)}
        if unit.keep is not None:
            save_adapter(model, kept_adapter(unit.keep, row))
    row |= {"parameters": count, "ranks": " ".join(map(str, ranks.values()))}
    val_loss, _ = trainee.evaluate(trainee.setting.val)
    test_loss, accuracy = trainee.evaluate(trainee.setting.test)
    return row | {"val_loss": val_loss, "test_loss": test_loss, "test_accuracy": accuracy}


def losses_by_rate(table: Table, task: str, arm: Arm) -> dict[float, float]:
    """Validation losses by learning rate, means over the seeds that a rate is chosen on, where each of them has one.

    In a table without these seeds all seeds count.
    """
    found: dict[float, list[float]] = {}
    rows = [row for row in table.rows if (row["task"], row["arm"]) == (task, str(arm))]
    for row in [row for row in rows if int(row["seed"]) < CHOOSING] or rows:
        found.setdefault(float(row["lr"]), []).append(float(row["val_loss"]))
    most = max(map(len, found.values()), default=0)
    return {lr: mean(losses) for lr, losses in found.items() if len(losses) == most}


def best_rate(table: Table, task: str, arm: Arm) -> float | None:
    """The learning rate with the lowest of these losses; None if it was trained at none."""
    losses = losses_by_rate(table, task, arm)
    return min(losses, key=lambda lr: losses[lr], default=None)


def at_an_edge(table: Table, task: str, arms: Sequence[Arm]) -> list[tuple[Arm, float]]:
    """Arms that are best at the lowest or highest rate tried, and the next rate to try."""
    edges = []
    for arm in arms:
        best = best_rate(table, task, arm)
        tried = losses_by_rate(table, task, arm)
        if best is not None and best in (min(tried), max(tried)) and isfinite(tried[best]):
            edges.append((arm, best / 2 if best == min(tried) else best * 2))
    return edges


def show(rows: Sequence[Mapping[str, str]], best: dict[Arm, float]) -> None:
    """Print a row for each arm at its best rate: means over seeds, and its distance to rank 16 within seeds."""
    names = (
        "arm",
        "seeds",
        "bytes",
        "highest rank",
        "rate",
        "at the cut",
        "test loss (sd)",
        "minus rank 16",
        "accuracy",
    )
    print(f"| {' | '.join(names)} |\n|" + "---|" * len(names))
    for arm, lr in best.items():
        mine = [row for row in rows if (row["arm"], row["lr"]) == (str(arm), f"{lr:.6g}")]
        loss = values(mine, "test_loss")
        less = beside_whole(rows, best, arm)
        rises = [float(row["rise"]) for row in mine if row["rise"]]
        sizes = [float(row["parameters"]) for row in mine if row["parameters"]]
        whole = values(rows, "parameters", arm=Arm(HIGH))
        # What a server's slot must hold.
        highest = sorted({max(map(int, row["ranks"].split())) for row in mine if row["ranks"]})
        cells = [
            str(arm),
            str(len(mine)),
            f"{mean(sizes) / whole[0]:.3f}" if sizes and whole else "",
            "-".join(map(str, highest[:1] + highest[1:][-1:])),
            f"{lr:.3g}",
            f"{mean(rises):+.1%}" if rises else "",
            f"{mean(loss):.3f}" + (f" ({stdev(loss):.3f})" if len(loss) > 1 and all(map(isfinite, loss)) else ""),
            "" if arm == Arm(HIGH) or not less else with_error(less),
            f"{mean(values(mine, 'test_accuracy')):.1%}",
        ]
        print("| " + " | ".join(cells) + " |")


def beside_whole(rows: Sequence[Mapping[str, str]], best: dict[Arm, float], arm: Arm) -> list[float]:
    """Test losses of an arm less those of rank 16 throughout, seed by seed, each at its best rate."""

    def losses(arm: Arm) -> dict[str, float]:
        key = str(arm), f"{best.get(arm, inf):.6g}"
        return {row["seed"]: float(row["test_loss"]) for row in rows if (row["arm"], row["lr"]) == key}

    whole = losses(Arm(HIGH))
    return [loss - whole[seed] for seed, loss in losses(arm).items() if seed in whole]


def draw(rows: Sequence[Mapping[str, str]], best: dict[Arm, float], task: str, file: Path) -> None:
    """Test loss, less rank 16's, against the bytes of the adapter; mean and standard error over seeds."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    styles = {"": "ko", "uniform": "vm", "weight": ">c", "brought": "^g", "found": "Xk"}
    styles |= {"GoRA": "Db", "AdaLoRA": "sr", "AdaLoRA's ranks": "^r", "AdaLoRA's bytes": "vg"}
    styles |= {"anneal": "Pb", "auto": "*y", "EVA": "dm", "rsLoRA": "ok"}
    labelled: set[str] = set()
    # Arms of nearly the same size are drawn side by side.
    drawn: Counter[float] = Counter()
    for arm, lr in best.items():
        mine = [row for row in rows if (row["arm"], row["lr"]) == (str(arm), f"{lr:.6g}") and row["parameters"]]
        less = beside_whole(rows, best, arm)
        if mine and less:
            size = mean(values(mine, "parameters")) * 4e-6
            error = 0.0
            if len(less) > 1:
                error = stdev(less) / len(less) ** 0.5
            place = size * 1.03 ** drawn[round(size, 1)]
            words = {"": "fixed", "brought": "pool by importance", "weight": "pool by weight"}
            label = None if arm.by in labelled else words.get(arm.by, arm.by)
            drawn[round(size, 1)] += 1
            labelled.add(arm.by)
            axes.errorbar([place], [mean(less)], [error], fmt=styles[arm.by], label=label, alpha=0.7)
            notes = [part for part in str(arm).split(", ") if part.startswith(("at most", "pooler", "rate"))]
            notes += ["late"] if arm.is_cut and arm.at > EARLY else []
            note = ", ".join([*([f"from {arm.start}"] if arm.start != HIGH else []), *notes])
            axes.annotate(note, (place, mean(less)), xytext=(6, -3), textcoords="offset points", fontsize=7)
    axes.margins(x=0.1)
    axes.set(xscale="log", xlabel="adapter, MB in float32; arms of one size side by side")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_ylabel("test loss less rank 16's in the same seed, mean and standard error")
    axes.set_title(f"{task}: each arm at its best learning rate of those that were tried")
    axes.grid(alpha=0.3)
    if labelled:
        axes.legend()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    start(main)
