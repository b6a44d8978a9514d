"""What a large cut costs: medical_terms, 16 -> 2 at step 120 of 240, in each metric, with and without transport.

Of each seed, one model of rank 16 is trained to the middle; every arm goes on from that very state, with the same
batches and dropout. Writes scripts/results/truncation.csv (a row per seed and arm; arms that it holds already are
not run again), scripts/results/truncation.png, and prints the table, means over seeds.
Run: .venv/bin/python scripts/study_truncation.py [--seeds N]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from matplotlib.figure import Figure
from medical_bench import RESULTS, Setting, Table, Trainee, adapted, adapter_parameters, budget_ranks, values
from rich.console import Console
from rich.table import Table as Printed
from torch import nn

from dynrank import lora_layers, resize
from dynrank.change.measuring import Moments
from dynrank.schedules import How
from dynrank.targets import Budget

STEPS, CUT, WINDOW = 240, 120, 20
HIGH, LOW = 16, 2
METRICS = ("weight", "output", "loss")
FIELDS = ("seed", "arm", "parameters", "energy_kept", "val_before", "val_after", "test_loss", "test_accuracy")


@dataclass(frozen=True)
class Arm:
    """How to get from rank 16 to the parameters of rank 2; ``shared`` is by a budget instead of 2 everywhere."""

    metric: str
    optimizer_state: str = "transport"
    shared: bool = False
    spared: str = ""  # a layer that keeps its rank

    @property
    def how(self) -> How:
        return How(metric=self.metric, optimizer_state=self.optimizer_state)

    def __str__(self) -> str:
        ranks = "budget" if self.shared else f"all but {self.spared.rpartition('.')[0]}" if self.spared else "uniform"
        return f"{ranks}, {self.metric}, {self.optimizer_state}"


ARMS = [
    *(Arm(metric, state) for metric in METRICS for state in ("transport", "reset")),
    *(Arm(metric, shared=True) for metric in METRICS),
    Arm("weight", spared="bert.pooler.dense"),
]
BOUNDS = {"rank 16 throughout": HIGH, "rank 2 from the start": LOW}


def main() -> None:
    """Run what is missing, then print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file and the plot")
    options = parser.parse_args()
    table = Table(options.out / "truncation.csv", FIELDS, ("seed", "arm"))
    for seed in range(options.seeds):
        run_seed(seed, table)
    show(table)
    draw(table, options.out / "truncation.png")


def run_seed(seed: int, table: Table) -> None:
    """Every arm of one seed that the table lacks."""
    arms = [arm for arm in ARMS if table.lacks(seed, arm)]
    bounds = {name: rank for name, rank in BOUNDS.items() if table.lacks(seed, name)}
    if not arms and not bounds:
        return
    setting = Setting(seed, STEPS)
    for name, rank in bounds.items():
        finish(adapted(setting, rank), seed, name, {"energy_kept": 1.0, "val_before": "", "val_after": ""}, table)
    if not arms:
        return
    trunk = adapted(setting, HIGH)
    trunk.train(CUT - WINDOW)
    with closing(Moments(dict(lora_layers(trunk.model)), WINDOW)) as measured:
        trunk.train(CUT, after_step=lambda step: measured.end_step())
    before, _ = trunk.evaluate(setting.val)
    for arm in arms:
        trainee = deepcopy(trunk)
        reports = resize(
            trainee.model,
            targets(trainee.model, arm, measured),
            optimizers=[trainee.optimizer],
            how=arm.how,
            measured=measured,
        )
        after, _ = trainee.evaluate(setting.val)
        kept = mean(report.energy_kept for report in reports)
        finish(trainee, seed, str(arm), {"energy_kept": kept, "val_before": before, "val_after": after}, table)


def targets(model: nn.Module, arm: Arm, measured: Moments) -> dict[str, int]:
    """New ranks of an arm, by layer."""
    if arm.shared:
        return budget_ranks(model, Budget(share=LOW / HIGH), arm.how, measured)
    return {name: HIGH if name == arm.spared else LOW for name, _ in lora_layers(model)}


def finish(trainee: Trainee, seed: int, arm: str, known: Mapping[str, object], table: Table) -> None:
    """Train to the end, test, and add the row."""
    trainee.train(STEPS)
    loss, accuracy = trainee.evaluate(trainee.setting.test)
    row = {"seed": seed, "arm": arm, "parameters": adapter_parameters(trainee.model), **known}
    table.add(row | {"test_loss": loss, "test_accuracy": accuracy})
    print(f"seed {seed}, {arm}: test loss {loss:.3f}", flush=True)


def show(table: Table) -> None:
    """The means over seeds as a table."""
    printed = Printed(title=f"medical_terms, {HIGH} -> {LOW} at step {CUT} of {STEPS}, {len(seeds(table))} seeds")
    for column in ("arm", "parameters", "energy kept", "val loss before", "right after", "test loss (sd)", "accuracy"):
        printed.add_column(column, justify="left" if column == "arm" else "right")
    for arm in [*BOUNDS, *map(str, ARMS)]:
        kept, size, loss, accuracy = (
            values(table.rows, column, arm=arm)
            for column in ("energy_kept", "parameters", "test_loss", "test_accuracy")
        )
        jump = ["", ""]
        if arm not in BOUNDS:
            jump = [f"{mean(values(table.rows, column, arm=arm)):.3f}" for column in ("val_before", "val_after")]
        spread = f" ({stdev(loss):.3f})" if len(loss) > 1 else ""
        printed.add_row(
            arm, f"{mean(size):,.0f}", f"{mean(kept):.2f}", *jump, f"{mean(loss):.3f}{spread}", f"{mean(accuracy):.1%}"
        )
    Console(width=140).print(printed)


def draw(table: Table, file: Path) -> None:
    """Loss right after the cut and at the end, a dot per seed, a bar at the mean."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    arms = [*map(str, ARMS), *BOUNDS][::-1]
    panels = (("val_after", "validation loss right after the cut"), ("test_loss", "test loss at the end"))
    for axes, (column, title) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        for height, arm in enumerate(arms):
            if column == "val_after" and arm in BOUNDS:
                continue
            losses = values(table.rows, column, arm=arm)
            axes.plot(losses, [height] * len(losses), "o", color="tab:blue", alpha=0.5)
            axes.plot([mean(losses)], [height], "|", color="black", markersize=14)
        axes.set_xlabel(title)
        axes.grid(axis="x", alpha=0.3)
        axes.set_yticks(range(len(arms)), arms)
        if column == "val_after":
            before = mean(values(table.rows, "val_before", arm=ARMS[0]))
            axes.axvline(before, color="tab:gray", linestyle="--", label="before the cut")
            axes.legend()
    figure.suptitle(f"medical_terms, {HIGH} -> {LOW} at step {CUT} of {STEPS}; dots: seeds, bars: means")
    figure.savefig(file, dpi=110)


def seeds(table: Table) -> set[str]:
    """Those that the table holds."""
    return {row["seed"] for row in table.rows}


if __name__ == "__main__":
    torch.set_num_threads(1)  # small products: a second thread mostly spins
    main()
