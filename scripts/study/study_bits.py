"""What fewer bits cost beside lower ranks: finished adapters of the study, rounded and tested again.

Run study.py with --keep FOLDER first. Each adapter that FOLDER holds is rounded after its training, without data: to
bfloat16; to fp8 (e4m3), whose scales are powers of two that a layer's alpha undoes; and to 4 and 3 bits, levels of
Lloyd and Max for normal numbers with a float16 scale for each 64 of them, by least squares. But for bfloat16 the
factors are balanced first. Bytes are the factors' with their scales, and not the head's, which stays as it was trained.
The error is that of all updates, as a share of their norm.

The program adds a row to bits.csv as soon as it has one, and prints a table. It may be interrupted.
Run: .venv/bin/python scripts/study/study_bits.py [TASK] --keep FOLDER [--seeds N ...] [--only PATTERN]
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import mean

import torch
from study import FIELDS as STUDY_FIELDS
from study_arms import HIGH, Arm
from study_bench import RESULTS, TASKS, Setting, Table, kept_adapter, values, with_error
from torch import Tensor

from dynrank import lora_layers, swap_adapter

FIELDS = ("task", "seed", "arm", "lr", "format", "bytes", "error", "test_loss", "test_accuracy")
# Numbers that share a scale.
GROUP = 64
# A pair of factors, and the bytes that both take.
Rounded = tuple[Tensor, Tensor, int]


def main(arguments: Sequence[str] | None = None) -> None:
    """Round and test what is missing, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=TASKS, default="medical_terms")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", required=True, help="that study.py has kept adapters in")
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5])
    parser.add_argument("--only", default="", metavar="PATTERN", help="arms whose names hold this regular expression")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of study.csv and bits.csv")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="configuration: task.model=FOLDER")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    overrides = (*TASKS[options.task].overrides, *options.set)
    table = Table(options.out / "bits.csv", FIELDS, ("task", "seed", "arm", "lr", "format"))
    trained = Table(options.out / "study.csv", STUDY_FIELDS, ()).rows
    for seed in options.seeds:
        kept = [
            (row, kept_adapter(options.keep, row))
            for row in trained
            if (row["task"], row["seed"]) == (options.task, str(seed)) and re.search(options.only, row["arm"])
        ]
        missing = {
            folder: (row, [name for name in FORMATS if table.lacks(row["task"], seed, row["arm"], row["lr"], name)])
            for row, folder in kept
            if folder.exists()
        }
        if any(formats for _, formats in missing.values()):
            _measure(Setting(seed, 1, overrides), missing, table)
    show([row for row in table.rows if row["task"] == options.task])


def _measure(setting: Setting, missing: Mapping[Path, tuple[Mapping[str, str], list[str]]], table: Table) -> None:
    """Add a row for each adapter and format."""
    model = setting.model()
    for folder, (row, formats) in missing.items():
        swap_adapter(model, folder)
        layers = [layer for _, layer in lora_layers(model)]
        factors = [(layer.lora_B.detach().clone(), layer.lora_A.detach().clone()) for layer in layers]
        for name in formats:
            rounded = [FORMATS[name](*pair) for pair in factors]
            for layer, (left, right, _) in zip(layers, rounded, strict=True):
                layer.lora_B.data.copy_(left)
                layer.lora_A.data.copy_(right)
            loss, accuracy = setting.trainee(model).evaluate(setting.test)
            new: dict[str, object] = {key: row[key] for key in ("task", "seed", "arm", "lr")}
            new |= {"format": name, "bytes": sum(size for _, _, size in rounded), "error": error(factors, rounded)}
            table.add(new | {"test_loss": loss, "test_accuracy": accuracy})
            print(", ".join(table.rows[-1][key] for key in ("seed", "arm", "format", "error", "test_loss")), flush=True)


def error(factors: Sequence[tuple[Tensor, Tensor]], rounded: Sequence[Rounded]) -> float:
    """Norm of the difference of all updates, as a share of the norm of all."""
    lost = 0.0
    whole = 0.0
    for (left, right), (new_left, new_right, _) in zip(factors, rounded, strict=True):
        update = left @ right
        lost += float((update - new_left @ new_right).square().sum())
        whole += float(update.square().sum())
    return math.sqrt(lost / whole)


def as_trained(left: Tensor, right: Tensor) -> Rounded:
    """The factors in float32."""
    return left, right, 4 * (left.numel() + right.numel())


def bfloat16(left: Tensor, right: Tensor) -> Rounded:
    """The factors to 16 bits, as they are."""
    return left.bfloat16().float(), right.bfloat16().float(), 2 * (left.numel() + right.numel())


def float8(left: Tensor, right: Tensor) -> Rounded:
    """Balanced factors to 8 bits. Each is multiplied by the power of two that its largest number leaves room for."""
    kept = []
    for factor in balanced(left, right):
        scale = 2.0 ** torch.floor(
            torch.log2(torch.finfo(torch.float8_e4m3fn).max / factor.abs().max().clamp(min=1e-30))
        )
        kept.append((factor * scale).to(torch.float8_e4m3fn).float() / scale)
    return kept[0], kept[1], left.numel() + right.numel()


def codes(bits: int) -> Callable[[Tensor, Tensor], Rounded]:
    """Balanced factors to the levels of a codebook, with their scales."""

    def rounded(left: Tensor, right: Tensor) -> Rounded:
        left, right = balanced(left, right)
        # The numbers of a direction lie side by side.
        columns = to_levels(left.T, codebook(bits)).T
        rows = to_levels(right, codebook(bits))
        scales = sum(math.ceil(factor.numel() / GROUP) for factor in (left, right))
        return columns, rows, math.ceil((left.numel() + right.numel()) * bits / 8) + 2 * scales

    return rounded


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product whose columns and rows have the roots of its singular values as their norms."""
    basis, upper = torch.linalg.qr(left)
    other_basis, lower = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(upper @ lower.T)
    return (basis @ u) * s.sqrt(), s.sqrt()[:, None] * (vh @ other_basis.T)


@cache
def codebook(bits: int, rounds: int = 2000) -> Tensor:
    """Levels, in order, that normal numbers of variance 1 are nearest to (Lloyd 1982, Max 1960)."""
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    count = 2**bits
    levels = normal.icdf((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    ends = torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(rounds):
        edges = torch.cat([-ends, (levels[1:] + levels[:-1]) / 2, ends])
        density = torch.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
        # Each level is the mean of the normal numbers between its edges.
        levels = (density[:-1] - density[1:]) / (normal.cdf(edges[1:]) - normal.cdf(edges[:-1]))
    return levels.float()


def to_levels(factor: Tensor, levels: Tensor, rounds: int = 8) -> Tensor:
    """The nearest multiples of the levels, each group of numbers with a float16 scale by least squares."""
    # Zeros fill the last group.
    numbers = torch.nn.functional.pad(factor.flatten(), (0, -factor.numel() % GROUP)).view(-1, GROUP)
    edges = (levels[1:] + levels[:-1]) / 2
    scale = numbers.square().mean(1, keepdim=True).sqrt().clamp(min=1e-7)
    for _ in range(rounds):
        nearest = levels[torch.bucketize(numbers / scale, edges)] * (numbers != 0)
        scale = (numbers * nearest).sum(1, keepdim=True) / nearest.square().sum(1, keepdim=True).clamp(min=1e-30)
        scale = scale.half().float().clamp(min=1e-7)
    nearest = levels[torch.bucketize(numbers / scale, edges)]
    return (scale * nearest).flatten()[: factor.numel()].view_as(factor)


FORMATS: dict[str, Callable[[Tensor, Tensor], Rounded]] = {
    "float32": as_trained,
    "bfloat16": bfloat16,
    "fp8": float8,
    "4 bits": codes(4),
    "3 bits": codes(3),
}


def show(rows: Sequence[Mapping[str, str]]) -> None:
    """Print a row for each arm, rate and format: means over seeds, and the distance to rank 16 as it was trained."""
    whole = {row["seed"]: row for row in rows if (row["arm"], row["format"]) == (str(Arm(HIGH)), "float32")}
    print("| arm | rate | format | seeds | bytes | error of the update | test loss | minus rank 16 | minus unrounded |")
    print("|" + "---|" * 9)
    for arm, lr in dict.fromkeys((row["arm"], row["lr"]) for row in rows):
        mine = [row for row in rows if (row["arm"], row["lr"]) == (arm, lr)]
        trained = {row["seed"]: row for row in mine if row["format"] == "float32"}
        for name in FORMATS:
            found = [row for row in mine if row["format"] == name]
            if found:
                # The bytes of rank 16 in bfloat16 are 1.
                sizes = [
                    2 * float(row["bytes"]) / float(whole[row["seed"]]["bytes"])
                    for row in found
                    if row["seed"] in whole
                ]
                cells = [arm, lr, name, str(len(found)), f"{mean(sizes):.3f}" if sizes else ""]
                cells += [f"{mean(values(found, 'error')):.2%}", f"{mean(values(found, 'test_loss')):.3f}"]
                for others in (whole, trained):
                    less = [
                        float(row["test_loss"]) - float(others[row["seed"]]["test_loss"])
                        for row in found
                        if row["seed"] in others
                    ]
                    cells.append(with_error(less) if less else "")
                print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: start it again to go on")
        raise SystemExit(130) from None
