"""For which inputs the fused op pays in PEFT's layers on a CPU: what sizes.csv and expert_sizes.csv of kernels/ hold.

For each dtype, with and without dropout, it measures one layer forward and backward with the op beside the same layer
without it, over tokens and widths, with one thread and with two; then modules of experts. Both run in one process, in
turns and in a random order, and the figure is the median of the ratios within a round. The op pays from the smallest
size on above which it was nowhere slower; in experts, whose weights PEFT adds up anew in each call, up to the most rows
of an expert below which it was nowhere slower. Rows go to bench/results/sizes.csv as they are measured; a row that is
there is not measured again.
Run: .venv/bin/python scripts/bench/sizes.py [--seconds S] [--write]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from measuring import append_row, ratio, rounds
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from dynrank import apply_lora_kernel
from dynrank.kernels import backends

ROWS = Path(__file__).with_name("results") / "sizes.csv"
TABLES = Path(backends.__file__).parent
# The dtype of the base, and that of its products. The factors are float32, as PEFT makes them.
DTYPES = (("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16"))
# PEFT multiplies a bfloat16 base by factors in float32, but under autocast.
AUTOCAST = {("float32", "bfloat16"): (True,), ("bfloat16", "bfloat16"): (False, True), ("float32", "float32"): (False,)}
TOKENS = (16, 64, 256, 1024, 4096)
WIDTHS = (64, 256, 576, 1024, 2048)
EXPERTS = ((8, 2), (32, 8))
EXPERT_TOKENS = (1, 16, 64, 256, 1024)
EXPERT_WIDTHS = (64, 128, 256, 512)
# Below this the op cannot pay, and above all that there is pays.
LEAST = 2**14
MOST = 2**21
RANK = 16
KEY = ("threads", "weight", "computes", "autocast", "dropout", "experts", "chosen", "tokens", "width")
FIELDS = (*KEY, "ratio", "quartiles")


class Case(NamedTuple):
    """What is measured, in the order of KEY; no experts mean a linear layer."""

    threads: int
    weight: str
    computes: str
    autocast: bool
    dropout: str
    experts: int
    chosen: int
    tokens: int
    width: int


def main() -> None:
    """Measure what has no row yet, then print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.5, help="for each row")
    parser.add_argument("--write", action="store_true", help="write kernels/sizes.csv")
    options = parser.parse_args()
    known = {tuple(row[name] for name in KEY) for row in stored_rows()}
    # The op runs whatever the size, because this is what is measured.
    backends.CPU_SIZES.update(dict.fromkeys(backends.CPU_SIZES, backends.Size(0, 0)))
    backends.CPU_EXPERTS.update(dict.fromkeys(backends.CPU_EXPERTS, backends.ExpertSize(0, 1e9)))
    for case in cases():
        key = tuple(map(str, case))
        if key not in known:
            append_row(ROWS, FIELDS, (*key, *measure(case, seconds=options.seconds)))
    rows = stored_rows()
    tables = {
        "sizes.csv": [("weight", "computes", "dropout", "tokens", "elements"), *paying(rows)],
        "expert_sizes.csv": [("weight", "width", "rows_by_width"), *paying_experts(rows)],
    }
    for name, lines in tables.items():
        text = "".join(",".join(map(str, line)) + "\n" for line in lines)
        if options.write:
            (TABLES / name).write_text(text, encoding="utf-8")
        print(name, text, sep="\n")


def cases() -> Iterator[Case]:
    """All that is measured."""
    for threads, dtypes, dropout in itertools.product((1, 2), DTYPES, ("no", "yes")):
        for autocast, tokens, width in itertools.product(AUTOCAST[dtypes], TOKENS, WIDTHS):
            if LEAST <= tokens * width <= MOST:
                yield Case(threads, *dtypes, autocast, dropout, 0, 0, tokens, width)
    for threads, dtype, experts in itertools.product((1, 2), ("float32", "bfloat16"), EXPERTS):
        for tokens, width in itertools.product(EXPERT_TOKENS, EXPERT_WIDTHS):
            yield Case(threads, dtype, dtype, False, "no", *experts, tokens, width)


def measure(case: Case, *, seconds: float) -> tuple[str, str]:
    """(time of a layer with the op / without it, quartiles)."""
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    base = Experts(case) if case.experts else nn.Sequential(nn.Linear(case.width, case.width))
    stacks = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    where = stacks if case.experts else {"target_modules": ["0"]}
    config = LoraConfig(r=RANK, lora_dropout=0.1 if case.dropout == "yes" else 0.0, **where)
    plain = get_peft_model(base.to(getattr(torch, case.weight)), config).base_model.model.train()
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    fused = apply_lora_kernel(copy.deepcopy(plain))
    x = torch.randn(case.tokens, case.width).to(getattr(torch, case.weight)).requires_grad_()
    dy = torch.randn(case.tokens, case.width).to(getattr(torch, case.computes))
    steps = {"fused": _step(fused, x, dy, case.autocast), "plain": _step(plain, x, dy, case.autocast)}
    start = time.perf_counter()
    steps["plain"]()
    steps["fused"]()
    count = max(11, int(seconds / (time.perf_counter() - start)))
    taken = rounds(steps, count)
    median, quartiles = ratio(taken["fused"], taken["plain"])
    return f"{median:.3f}", quartiles


class Experts(nn.Module):
    """A module of experts of transformers, by its faster implementation, and a choice of them that stays."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        size = {"hidden_size": case.width, "moe_intermediate_size": case.width, "num_experts": case.experts}
        self.experts = Qwen3MoeExperts(Qwen3MoeConfig(**size, experts_implementation="grouped_mm"))
        for weight in self.experts.parameters():
            nn.init.normal_(weight, std=case.width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        draws = torch.rand(len(x), self.case.experts, generator=torch.Generator().manual_seed(0))
        chosen = draws.topk(self.case.chosen)
        y: Tensor = self.experts(x, chosen.indices, chosen.values.to(x.dtype))
        return y


def _step(layer: nn.Module, x: Tensor, dy: Tensor, autocast: bool) -> Callable[[], None]:
    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            y = layer(x)
        torch.autograd.backward(y, dy)

    return step


def stored_rows() -> list[dict[str, str]]:
    """The rows of the file so far."""
    if not ROWS.exists():
        return []
    with ROWS.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def paying(rows: list[dict[str, str]]) -> Iterator[tuple[str, str, str, int, int]]:
    """The lines of the table: the bounds of tokens and size above which the op was nowhere slower, the widest ones."""
    for (weight, computes), dropout in itertools.product(DTYPES, ("no", "yes")):
        case = (weight, computes, dropout, "0")
        of_case = [row for row in rows if (row["weight"], row["computes"], row["dropout"], row["experts"]) == case]
        found = []
        for tokens in TOKENS:
            measured = [row for row in of_case if int(row["tokens"]) >= tokens]
            slower = max((size_of(row) for row in measured if float(row["ratio"]) > 1), default=0)
            larger = [size_of(row) for row in measured if size_of(row) > slower]
            if larger:
                found.append((sum(larger), -tokens, min(larger)))
        if found:
            _, tokens, elements = max(found)
            yield weight, computes, dropout, -tokens, elements


def paying_experts(rows: list[dict[str, str]]) -> Iterator[tuple[str, int, float]]:
    """The lines of the table: the bounds of width and of rows of an expert / width, again the widest ones."""
    for weight in ("float32", "bfloat16"):
        of_case = [row for row in rows if row["experts"] != "0" and row["weight"] == weight]
        found = []
        for width in EXPERT_WIDTHS:
            measured = [row for row in of_case if int(row["width"]) >= width]
            slower = min((rows_by_width(row) for row in measured if float(row["ratio"]) > 1), default=float("inf"))
            fewer = [row for row in measured if rows_by_width(row) < slower]
            if fewer:
                found.append((sum(map(size_of, fewer)), -width, max(map(rows_by_width, fewer))))
        if found:
            _, width, share = max(found)
            yield weight, -width, share


def rows_by_width(row: dict[str, str]) -> float:
    """The mean rows of an expert / the width of a row."""
    return int(row["tokens"]) * int(row["chosen"]) / int(row["experts"]) / int(row["width"])


def size_of(row: dict[str, str]) -> int:
    """The elements of the layer's input."""
    return int(row["tokens"]) * int(row["width"])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
