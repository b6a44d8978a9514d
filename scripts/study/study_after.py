"""What a cut in the run gains over compressing afterwards: finished adapters of the study, squeezed and tested again.

Run study.py with --keep FOLDER first. Each adapter that FOLDER holds is made smaller after its training, without data,
by dynrank.squeeze: to a rank, to a share of its parameters, to a share of each layer's energy, and to 4 bits. Bytes are
those of the factors, as bfloat16 or, in 4 bits, as their codes with their scales.

The program adds a row to after.csv as soon as it has one, and prints a table. It may be interrupted.
Run: .venv/bin/python scripts/study/study_after.py [TASK] --keep FOLDER [--seeds N ...] [--only PATTERN]
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rounding import bits_of
from study import FIELDS as STUDY_FIELDS
from study_arms import HIGH, Arm
from study_bench import RESULTS, TASKS, Setting, Table, adapter_parameters, kept_adapter, start, values, with_error

from dynrank import lora_layers, squeeze, swap_adapter

FIELDS = ("task", "seed", "arm", "lr", "way", "parameters", "bytes", "test_loss", "test_accuracy", "ranks")
TRAINED = "as trained"
WAYS: dict[str, dict[str, Any]] = {
    TRAINED: {},
    **{f"energy {share}": {"energy": share} for share in (0.999, 0.99, 0.98, 0.95)},
    "4 bits": {"dtype": "nf4"},
}
# Those that only make sense for the high rank, to the bytes of the cuts.
LOWER: dict[str, dict[str, Any]] = {
    **{f"rank {rank}": {"rank": rank} for rank in (8, 4)},
    **{f"budget {share}": {"budget": share} for share in ("50%", "25%")},
    **{f"budget {share}, 4 bits": {"budget": share, "dtype": "nf4"} for share in ("50%", "25%")},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Squeeze and test what is missing, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=TASKS, default="medical_terms")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", required=True, help="that study.py has kept adapters in")
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5])
    parser.add_argument("--only", default="", metavar="PATTERN", help="arms whose names hold this regular expression")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of study.csv and after.csv")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="configuration: task.model=FOLDER")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    overrides = (*TASKS[options.task].overrides, *options.set)
    table = Table(options.out / "after.csv", FIELDS, ("task", "seed", "arm", "lr", "way"))
    trained = Table(options.out / "study.csv", STUDY_FIELDS, ()).rows
    for seed in options.seeds:
        missing: list[tuple[Mapping[str, str], Path, dict[str, dict[str, Any]]]] = []
        for row in trained:
            folder = kept_adapter(options.keep, row)
            mine = (row["task"], row["seed"]) == (options.task, str(seed)) and re.search(options.only, row["arm"])
            if mine and folder.exists():
                ways = WAYS | (LOWER if row["arm"] == str(Arm(HIGH)) else {})
                lacks = {name: way for name, way in ways.items() if table.lacks(*_key(row).values(), name)}
                missing += [(row, folder, lacks)] if lacks else []
        if missing:
            setting = Setting(seed, 1, overrides)
            model = setting.model()
            for row, folder, ways in missing:
                for name, way in ways.items():
                    table.add(_key(row) | _measured(setting, model, folder, row, name, way))
                    print(", ".join(table.rows[-1][key] for key in ("seed", "arm", "way", "test_loss")), flush=True)
    show([row for row in table.rows if row["task"] == options.task])


def _key(row: Mapping[str, str]) -> dict[str, str]:
    return {name: row[name] for name in ("task", "seed", "arm", "lr")}


def _measured(
    setting: Setting, model: Any, folder: Path, row: Mapping[str, str], name: str, way: Mapping[str, Any]
) -> dict[str, object]:
    """The size and the loss of a kept adapter, made smaller in one way."""
    with TemporaryDirectory() as place:
        small = Path(place) / "small"
        if way:
            squeeze(folder, small, **way)
        swap_adapter(model, small if way else folder)
    layers = [layer for _, layer in lora_layers(model)]
    form = way.get("dtype", "bfloat16")
    bits = sum(bits_of(layer.lora_B, layer.lora_A, form) for layer in layers)
    found: dict[str, object] = {"way": name, "parameters": adapter_parameters(model), "bytes": math.ceil(bits / 8)}
    found["ranks"] = " ".join(str(layer.rank) for layer in layers)
    if not way:
        return found | {name: row[name] for name in ("test_loss", "test_accuracy")}
    loss, accuracy = setting.trainee(model).evaluate(setting.test)
    return found | {"test_loss": loss, "test_accuracy": accuracy}


def show(rows: Sequence[Mapping[str, str]]) -> None:
    """Print a row for each arm, rate and way: means over seeds, and distances within seeds."""
    whole = {row["seed"]: row for row in rows if (row["arm"], row["way"]) == (str(Arm(HIGH)), TRAINED)}
    print("| arm | rate | afterwards | seeds | bytes | of its own | test loss | minus rank 16 | minus as trained |")
    print("|" + "---|" * 9)
    for arm, lr, way in dict.fromkeys((row["arm"], row["lr"], row["way"]) for row in rows):
        mine = [row for row in rows if (row["arm"], row["lr"]) == (arm, lr)]
        before = {row["seed"]: row for row in mine if row["way"] == TRAINED}
        found = [row for row in mine if row["way"] == way]
        cells = [arm, lr, way, str(len(found))]
        for others in (whole, before):
            shares = [
                float(row["bytes"]) / float(others[row["seed"]]["bytes"]) for row in found if row["seed"] in others
            ]
            cells.append(f"{mean(shares):.3f}" if shares else "")
        cells.append(f"{mean(values(found, 'test_loss')):.3f}")
        for others in (whole, before):
            compared = [(row, others[row["seed"]]) for row in found if row["seed"] in others]
            less = [float(row["test_loss"]) - float(other["test_loss"]) for row, other in compared]
            cells.append(with_error(less) if less else "")
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    start(main)
