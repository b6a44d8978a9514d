"""Host time of LoRA layers, forward and backward, on tensors so small that arithmetic costs next to nothing.

On a GPU this is the time that it takes to launch a layer. Every round runs all functions once in a random order. A
figure is the median over rounds of one thread's CPU time, so other processes of the machine matter little.
Run: .venv/bin/python scripts/bench/host.py [--rounds N]
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
import warnings
from collections.abc import Callable, Mapping

import torch
from peft import LoraConfig, get_peft_model
from rich.table import Table
from torch import Tensor, nn

from dynrank import add_lora, apply_lora_kernel
from dynrank.output.console import table_console

WIDTH = 16
RANK = 4
READERS = {"one layer": ("q_proj",), "q, k, v": ("q_proj", "k_proj", "v_proj")}


class Readers(nn.Module):
    """Linear layers that read one x."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.children()]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000)
    options = parser.parse_args()
    headings = ("what", "p", "ours", "PEFT", "PEFT, op", "frozen", "ours / PEFT", "PEFT, op / PEFT")
    table = Table(*headings, title="forward + backward, microseconds of one CPU thread")
    for (what, names), p in itertools.product(READERS.items(), (0.0, 0.1)):
        config = LoraConfig(r=RANK, target_modules=list(names), lora_dropout=p)
        size = {"rank": RANK, "target_modules": list(names), "dropout": p}
        models = {
            "ours": add_lora(Readers(names), **size),
            "PEFT": get_peft_model(Readers(names), config).base_model.model,
            "PEFT, op": apply_lora_kernel(get_peft_model(Readers(names), config)).base_model.model,
            "frozen": Readers(names).requires_grad_(False),
        }
        cost = _microseconds({n: _step(model.train(), len(names)) for n, model in models.items()}, options.rounds)
        shares = (f"{cost[name] / cost['PEFT']:.2f}" for name in ("ours", "PEFT, op"))
        table.add_row(what, str(p), *(f"{each:.0f}" for each in cost.values()), *shares)
    table_console().print(table)


def _step(model: nn.Module, layers: int) -> Callable[[], object]:
    x = torch.randn(2, 4, WIDTH, requires_grad=True)
    dy = torch.randn(2, 4, WIDTH)
    return lambda: torch.autograd.backward(model(x), [dy] * layers)


def _microseconds(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name in random.sample(list(functions), len(functions)):
            start = time.thread_time()
            functions[name]()
            taken[name].append(time.thread_time() - start)
    return {name: 1e6 * statistics.median(times) for name, times in taken.items()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main()
