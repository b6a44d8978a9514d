"""Does training under DeepSpeed's ZeRO 1, 2 and 3 end where a real cut under DDP ends? Two processes on the CPU.

::

    pip install -e '.[deepspeed]'    # beside the test extra
    python scripts/bench/zero.py --out scripts/bench/results/zero.csv    # half an hour on two cores
    python scripts/bench/zero.py "a cut" "resumed, by importance"
    python scripts/bench/zero.py --memory    # of one of the two processes

The runs are those of tests/distributed/zero_runs.py, of which the suite makes a few. A row is
one of them under one stage of ZeRO. "loss" is the largest difference of a step's loss from the same run under DDP;
"update" of B A and heads at the end, as they are saved, relative to their norm; "importance" relative to the largest;
"dead" is the largest number in masters and moments behind the live directions, after every step. Other checks have
their own column. Memory is counted in float32 copies of the factors at the first rank.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from measuring import peak_bytes
from transformers import TrainerCallback

from dynrank.distributed.zero import OWN_STATE

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "tests" / "distributed"
sys.path.insert(0, str(RUNS))

import zero_runs  # noqa: E402
from ends import keep, of_interpreters  # noqa: E402

COLUMNS = ("run", "zero", "ranks", "loss", "update", "importance", "rate", "dead", "other")


class Held(TrainerCallback):  # type: ignore[misc]
    """Bytes that importance holds in this process after each step: the last update of what the process trains."""

    def __init__(self, schedule: Any) -> None:
        self.schedule = schedule
        self.after: dict[int, int] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        states = self.schedule._run.optimizers[0].stepping.state.values()
        self.after[state.global_step] = sum(each[OWN_STATE].nbytes for each in states if OWN_STATE in each)


def memory(base: Path, folder: Path) -> dict[int, Any]:
    """{stage: what importance holds before and after the last change, and the peak of the change}; 0 is DDP."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=40, **shape)).save_pretrained(base)
    numbers = 2 * 64 * ((256 + 256) + 2 * (256 + 512))
    found = {}
    for stage in (0, 1, 2, 3):
        run = zero_runs.Run(partial(zero_runs.peft, r=64), zero_runs.HALF)
        trainer, schedule = zero_runs.trainer_of(run, stage, base, folder)
        counter = Held(schedule)
        if stage:
            trainer.add_callback(counter)
        peaks = []
        advance = schedule.driver.advance

        def measured(training: Any, advance: Any = advance, peaks: Any = peaks) -> None:
            if training.step == zero_runs.CHANGE:
                peaks.append(peak_bytes(lambda: advance(training)))
            else:
                advance(training)

        schedule.driver.advance = measured
        trainer.train()
        copies = {f"held after step {step}": size for step, size in counter.after.items() if step in (4, 8)}
        copies["peak of the change"] = peaks[0]
        found[stage] = {name: f"{value / 4 / numbers:.2f}" for name, value in copies.items()}
    return found


def rows_of(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the table; a check that has failed in a process has a row of its last line."""
    rows = []
    for name, found in results[0].items():
        failures = [each[name] for each in results if isinstance(each.get(name), str)]
        if failures:
            rows.append({"run": name, "other": "FAILED: " + failures[0].strip().splitlines()[-1]})
            continue
        for stage, result in found.items():
            if isinstance(result, dict) and "loss" in result:
                numbers = {key: f"{v:.1e}" if isinstance(v, float) else v for key, v in result.items()}
                rows.append({"run": name, "zero": stage, **numbers})
            else:
                rows.append({"run": name, "zero": stage, "other": str(result)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="runs; all if there are none")
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    parser.add_argument("--out", type=Path, help="a CSV file for the rows")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "runs"
        zero_runs.save_base(folder / "base")
        if arguments.memory:
            rows = rows_of(of_interpreters(Path(__file__), folder, path=str(RUNS)))
        else:
            program = RUNS / "zero_runs.py"
            rows = rows_of(of_interpreters(program, folder, *arguments.names))
            if not arguments.names or zero_runs.ALONE in arguments.names:
                rows += rows_of(of_interpreters(program, folder, count=1))
    for row in rows:
        print(*(f"{key}={value}" for key, value in row.items() if value != ""), sep="  ")
    if arguments.out:
        with arguments.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def measure_memory(folder: Path) -> None:
    """What one of the two processes does."""
    zero_runs.begin_without_cuda()
    keep(
        {"memory": partial(memory, folder / f"base {os.environ['RANK']}", folder / "out")},
        folder / f"{os.environ['RANK']}.pt",
        {},
    )


if __name__ == "__main__":
    if "RANK" in os.environ:
        measure_memory(Path(sys.argv[1]))
    else:
        main()
