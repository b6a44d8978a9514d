"""dynrank against PEFT's AdaLoRA: medical_terms, 16 -> an average of about 4, 300 steps, the same final parameters.

On the first seed every arm is trained at the same 6 learning rates, on the others at the best of them (by validation
loss) and its two neighbours, always with the same batches, dropout and scaling; each is judged by its test loss at the
rate where its mean validation loss is lowest. dynrank's budget on a seed is the smallest that an AdaLoRA run ended with
there. Writes scripts/results/adalora.csv (a row per run; runs that it holds already are not made again) and
scripts/results/adalora.png. With --cost it measures instead what a step takes and how many bytes are held, before and
after the cut, all models interleaved in one process, and writes scripts/results/adalora_cost.csv.
Run: .venv/bin/python scripts/compare_adalora.py [--seeds N] [--cost]
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import mean, quantiles, stdev
from typing import Any

import torch
from matplotlib.figure import Figure
from medical_bench import (
    HEAD,
    RESULTS,
    SCALING,
    Diverged,
    Setting,
    Table,
    Trainee,
    adapted,
    adapter_parameters,
    budget_ranks,
    values,
)
from peft import AdaLoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table as Printed
from torch import Tensor, nn

from dynrank import lora_layers, resize
from dynrank.change.measuring import Moments
from dynrank.schedules import How
from dynrank.targets import Budget

STEPS, FIRST, LAST, WINDOW = 300, 45, 195, 20  # AdaLoRA's budget falls from FIRST to LAST, along a cubic
BY_LOSS = How(metric="loss")
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
HIGH, LOW = 16, 4
ADALORA = "PEFT AdaLoRA"
FIELDS = ("seed", "arm", "lr", "parameters", "val_loss", "test_loss", "test_accuracy")
COST_FIELDS = ("model", "step_ratio", "quartile_1", "quartile_3", "adapter_bytes", "optimizer_bytes", "score_bytes")


@dataclass(frozen=True)
class Cuts:
    """How dynrank goes from rank 16 to the budget: at which steps, the pool shrinking by equal factors."""

    at: tuple[int, ...]


ARMS = {
    "dynrank, budget by loss, one cut": Cuts((120,)),
    "dynrank, budget by loss, four cuts": Cuts((60, 105, 150, 195)),
}
FIXED = "LoRA of rank 4 from the start"


def main() -> None:
    """Run what is missing, then print and draw; or measure costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cost", action="store_true", help="measure step times and bytes instead of quality")
    parser.add_argument("--rounds", type=int, default=60, help="of --cost: steps of each model that are timed")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files and the plot")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)  # peft on transformers 5
    if options.cost:
        measure_cost(options.rounds, options.out / "adalora_cost.csv")
        return
    table = Table(options.out / "adalora.csv", FIELDS, ("seed", "arm", "lr"))
    for seed in range(options.seeds):
        setting = Setting(seed, STEPS)
        for arm in (ADALORA, *ARMS, FIXED):
            for lr in rates(table, arm, seed):
                if table.lacks(seed, arm, lr):
                    run(setting, arm, lr, table)
    show(table)
    draw(table, options.out / "adalora.png")


def run(setting: Setting, arm: str, lr: float, table: Table) -> None:
    """Train one arm at one rate and add its row; the losses of a run that diverges are infinite."""
    if arm == ADALORA:
        trainee = adalora(setting, lr, first=FIRST, last=LAST)
    else:
        trainee = adapted(setting, LOW if arm == FIXED else HIGH, lr)
    val_loss, test_loss, accuracy = inf, inf, 0.0
    try:
        if arm in ARMS:
            pool = int(min(values(table.rows, "parameters", seed=setting.seed, arm=ADALORA)))
            cut_down(trainee, ARMS[arm], pool)
        trainee.train(STEPS, allocation_of(trainee) if arm == ADALORA else None)
        val_loss, _ = trainee.evaluate(setting.val)
        test_loss, accuracy = trainee.evaluate(setting.test)
    except Diverged as error:
        print(error)
    parameters = kept_parameters(trainee.model) if arm == ADALORA else adapter_parameters(trainee.model)
    table.add(
        {"seed": setting.seed, "arm": arm, "lr": lr, "parameters": parameters}
        | {"val_loss": val_loss, "test_loss": test_loss, "test_accuracy": accuracy}
    )
    print(f"seed {setting.seed}, {arm}, {lr:g}: {parameters:,} parameters, test loss {test_loss:.3f}", flush=True)


def cut_down(trainee: Trainee, cuts: Cuts, pool: int) -> None:
    """Train to the last cut, making each; the first needs no less than the window before it."""
    start = adapter_parameters(trainee.model)
    for index, step in enumerate(cuts.at, 1):
        trainee.train(step - WINDOW)
        with closing(Moments(dict(lora_layers(trainee.model)), WINDOW)) as measured:
            trainee.train(step, after_step=lambda _, measured=measured: measured.end_step())
        share = Budget(parameters=round(start * (pool / start) ** (index / len(cuts.at))))
        ranks = budget_ranks(trainee.model, share, BY_LOSS, measured)
        resize(trainee.model, ranks, optimizers=[trainee.optimizer], how=BY_LOSS, measured=measured)


def adalora(setting: Setting, lr: float | None, *, first: int, last: int, target: int = LOW) -> Trainee:
    """A fresh model with PEFT's AdaLoRA on every linear layer, whose budget falls from step ``first`` to ``last``.

    ``target`` is the mean rank that it falls to.
    """
    model = setting.classifier()
    targets = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != HEAD]
    config = AdaLoraConfig(
        init_r=HIGH,
        target_r=target,
        lora_alpha=round(SCALING * HIGH),  # PEFT divides by the initial rank
        tinit=first,
        tfinal=setting.steps - last,
        deltaT=5,
        total_step=setting.steps,
        target_modules=targets,
        modules_to_save=[HEAD],
    )
    return setting.trainee(get_peft_model(model, config).train(), lr)  # type: ignore[arg-type]


def allocation_of(trainee: Trainee) -> Callable[[int], None]:
    """What AdaLoRA wants done after each step."""
    model: Any = trainee.model
    allocate: Callable[[int], None] = model.base_model.update_and_allocate
    return allocate


def kept_parameters(model: nn.Module) -> int:
    """Numbers in the triplets that AdaLoRA has not masked."""
    rows = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    kept = {name: int((p != 0).sum()) for name, p in rows.items() if ".lora_E." in name}
    pairs = {name: (rows[name.replace("_E.", "_B.")], rows[name.replace("_E.", "_A.")]) for name in kept}
    return sum(kept[name] * (lora_B.shape[0] + 1 + lora_A.shape[1]) for name, (lora_B, lora_A) in pairs.items())


def rates(table: Table, arm: str, seed: int) -> tuple[float, ...]:
    """Learning rates to train an arm at: all on seed 0, then the best one there and its neighbours."""
    if seed == 0:
        return RATES
    best = min(range(len(RATES)), key=lambda i: values(table.rows, "val_loss", arm=arm, lr=RATES[i], seed=0))
    return RATES[max(0, best - 1) : best + 2]


def best_rate(table: Table, arm: str) -> float:
    """The learning rate with the lowest mean validation loss, of those that every seed was trained at."""
    losses = {lr: values(table.rows, "val_loss", arm=arm, lr=lr) for lr in RATES}
    most = max(map(len, losses.values()))
    return min((lr for lr in RATES if len(losses[lr]) == most), key=lambda lr: mean(losses[lr]))


def show(table: Table) -> None:
    """Each arm at its best rate, means over seeds."""
    seeds = sorted({row["seed"] for row in table.rows})
    printed = Printed(title=f"medical_terms, {STEPS} steps, {len(seeds)} seeds; rate of the best validation loss")
    for column in ("arm", "lr", "parameters", "test loss (sd)", "less AdaLoRA's, by seed", "accuracy"):
        printed.add_column(column, justify="left" if column == "arm" else "right")
    rival = values(table.rows, "test_loss", arm=ADALORA, lr=best_rate(table, ADALORA))
    for arm in (ADALORA, *ARMS, FIXED):
        lr = best_rate(table, arm)
        size, loss, accuracy = (
            values(table.rows, column, arm=arm, lr=lr) for column in ("parameters", "test_loss", "test_accuracy")
        )
        spread = f" ({stdev(loss):.3f})" if len(loss) > 1 else ""
        apart = " ".join(f"{ours - theirs:+.3f}" for ours, theirs in zip(loss, rival, strict=True))
        printed.add_row(
            arm, f"{lr:g}", f"{mean(size):,.0f}", f"{mean(loss):.3f}{spread}", apart, f"{mean(accuracy):.1%}"
        )
    Console(width=140).print(printed)


def draw(table: Table, file: Path) -> None:
    """Test loss by learning rate, a line per arm and seed (dashed after the first); diverged runs lie above."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for index, arm in enumerate((ADALORA, *ARMS, FIXED)):
        for seed in sorted({row["seed"] for row in table.rows}):
            rows = [row for row in table.rows if (row["arm"], row["seed"]) == (arm, seed)]
            points = sorted((float(row["lr"]), float(row["test_loss"])) for row in rows if row["test_loss"] != "inf")
            line = dict(color=f"C{index}", marker="o", markersize=4, label=arm if seed == "0" else None)
            axes.plot(*zip(*points, strict=True), **line, alpha=0.7, linestyle="-" if seed == "0" else "--")
    lowest = min(values(table.rows, "test_loss"))
    axes.set(xscale="log", xlabel="learning rate of the adapter", ylabel="test loss")
    axes.set_ylim(0.95 * lowest, 1.5 * lowest)
    axes.set_xticks(RATES, [f"{lr:g}" for lr in RATES])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(file, dpi=110)


def measure_cost(rounds: int, file: Path) -> None:
    """Times steps of all models in turn, relative to dynrank at rank 16, and counts what they hold."""
    setting = Setting(0, 2 * rounds + 40)
    ours_before, ours_after = adapted(setting, HIGH), adapted(setting, HIGH)
    cut_down(ours_after, Cuts((WINDOW,)), adapter_parameters(ours_after.model) * LOW // HIGH)
    theirs_before = adalora(setting, None, first=setting.steps - 2, last=setting.steps - 1)  # scores from the start
    theirs_after = adalora(setting, None, first=1, last=WINDOW)
    theirs_after.train(WINDOW + 1, allocation_of(theirs_after))
    models = {
        "dynrank before the cut (rank 16)": ours_before,
        "dynrank before, measuring for the cut": adapted(setting, HIGH),
        "dynrank after the cut": ours_after,
        f"{ADALORA} before its budget is reached": theirs_before,
        f"{ADALORA} after": theirs_after,
    }
    for trainee in models.values():
        trainee.done = WINDOW + 1  # all take the same batches: these differ in length
    reference, measured = list(models)[:2]
    window = Moments(dict(lora_layers(models[measured].model)), WINDOW)
    hooks = {name: allocation_of(trainee) for name, trainee in models.items() if ADALORA in name}
    hooks[measured] = lambda step: window.end_step()
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for index in range(rounds + 5):
        names = list(models)[index % len(models) :] + list(models)[: index % len(models)]
        for name in names:
            trainee = models[name]
            start = time.perf_counter()
            trainee.train(trainee.done + 1, hooks.get(name))
            if index >= 5:  # the first ones warm up
                seconds[name].append(time.perf_counter() - start)
    table = Table(file, COST_FIELDS, ("model",))
    table.rows = []
    for name, trainee in models.items():
        ratios = [ours / base for ours, base in zip(seconds[name], seconds[reference], strict=True)]
        low, median, high = quantiles(ratios, n=4)
        table.add({"model": name, "step_ratio": median, "quartile_1": low, "quartile_3": high} | held_bytes(trainee))
        print(*table.rows[-1].values(), sep=", ", flush=True)


def held_bytes(trainee: Trainee) -> Mapping[str, int]:
    """Bytes of the adapter, of its optimizer state, and of AdaLoRA's scores."""
    adapter = {name: p for name, p in trainee.model.named_parameters() if ".lora_" in name and p.requires_grad}
    states = [state for p in adapter.values() for state in trainee.optimizer.state[p].values()]
    allocator: Any = getattr(getattr(trainee.model, "base_model", None), "rankallocator", None)
    scores = [] if allocator is None else [allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc]
    return {
        "adapter_bytes": _bytes(adapter.values()),
        "optimizer_bytes": _bytes(states),
        "score_bytes": sum(_bytes(tensors.values()) for tensors in scores),
    }


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


if __name__ == "__main__":
    torch.set_num_threads(1)  # small products: a second thread mostly spins
    main()
