"""What fewer bits cost beside lower ranks: finished adapters of the study, rounded and tested again.

Run study.py with --keep FOLDER first. Each adapter that FOLDER holds is rounded after its training, without data: to
bfloat16, to float8_e4m3fn, and to 4 and 3 bits by a codebook (normal4 and normal3 are Lloyd's and Max's for normal
numbers, nf4 is QLoRA's) with a float16 scale for each 64 numbers. Bytes are the factors' with their scales, and not the
head's, which stays as it was trained. The error is that of all updates, as a share of their norm.

The program adds a row to bits.csv as soon as it has one, and prints a table. It may be interrupted.
Run: .venv/bin/python scripts/study/study_bits.py [TASK] --keep FOLDER [--seeds N ...] [--only PATTERN]
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import torch
from rounding import bits_of, rounded
from study import FIELDS as STUDY_FIELDS
from study_arms import HIGH, Arm
from study_bench import RESULTS, TASKS, Setting, Table, kept_adapter, start, values, with_error
from torch import Tensor

from dynrank import lora_layers, swap_adapter

Pair = tuple[Tensor, Tensor]

FIELDS = ("task", "seed", "arm", "lr", "format", "bytes", "error", "test_loss", "test_accuracy")
TRAINED = "float32"
FORMATS = (TRAINED, "bfloat16", "float8_e4m3fn", "normal4", "normal3", "nf4")


def main(arguments: Sequence[str] | None = None) -> None:
    """Round and test what is missing, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=TASKS, default="medical_terms")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", required=True, help="that study.py has kept adapters in")
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
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
            folder: (
                row,
                [name for name in options.formats if table.lacks(row["task"], seed, row["arm"], row["lr"], name)],
            )
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
        key = {name: row[name] for name in ("task", "seed", "arm", "lr")}
        for name in formats:
            kept = factors if name == TRAINED else [rounded(*pair, name) for pair in factors]
            bits = sum(32 * (b.numel() + a.numel()) if name == TRAINED else bits_of(b, a, name) for b, a in factors)
            losses: dict[str, object] = {name: row[name] for name in ("test_loss", "test_accuracy")}
            if name != TRAINED:
                for layer, (lora_B, lora_A) in zip(layers, kept, strict=True):
                    layer.lora_B.data.copy_(lora_B)
                    layer.lora_A.data.copy_(lora_A)
                loss, accuracy = setting.trainee(model).evaluate(setting.test)
                losses = {"test_loss": loss, "test_accuracy": accuracy}
            sizes = {"format": name, "bytes": math.ceil(bits / 8), "error": error(factors, kept)}
            table.add(key | sizes | losses)
            print(", ".join(table.rows[-1][key] for key in ("seed", "arm", "format", "error", "test_loss")), flush=True)


def error(factors: Sequence[Pair], kept: Sequence[Pair]) -> float:
    """Norm of the difference of all updates, as a share of the norm of all."""
    lost = 0.0
    whole = 0.0
    for (lora_B, lora_A), (new_B, new_A) in zip(factors, kept, strict=True):
        update = lora_B @ lora_A
        lost += float((update - new_B @ new_A).square().sum())
        whole += float(update.square().sum())
    return math.sqrt(lost / whole)


def show(rows: Sequence[Mapping[str, str]]) -> None:
    """Print a row for each arm, rate and format: means over seeds, and the distance to rank 16 as it was trained."""
    whole = {row["seed"]: row for row in rows if (row["arm"], row["format"]) == (str(Arm(HIGH)), TRAINED)}
    print("| arm | rate | format | seeds | bytes | error of the update | test loss | minus rank 16 | minus unrounded |")
    print("|" + "---|" * 9)
    for arm, lr in dict.fromkeys((row["arm"], row["lr"]) for row in rows):
        mine = [row for row in rows if (row["arm"], row["lr"]) == (arm, lr)]
        trained = {row["seed"]: row for row in mine if row["format"] == TRAINED}
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
    start(main)
