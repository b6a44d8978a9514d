"""LoRA layers on a GPU, forward and backward: beside the frozen linear, PEFT and unsloth's order of operations.

Every round runs all of them once, in a random order. GPU time is that of a CUDA graph, between two events, so it
includes nothing of the host. What cannot be captured in a graph is timed as it is launched, and marked "eager". Host
time is that of one CPU thread. The gradients come from torch.autograd.grad, which adds nothing to x.grad.
The program prints a markdown table. It appends each row, as soon as it is measured, to kernels/measured.csv, by which
lora.backend=auto decides; a size that the file has for this card is not measured again.
The targets are for an H100, 8192 tokens, d = 4096 (roofline arithmetic in bfloat16).
Without a GPU, --device cpu runs the same code on small sizes. Its times mean nothing, and it keeps no row.
Run: .venv/bin/python scripts/bench/gpu.py [--ranks 8 16 64] [--tokens M…] [--shapes D_INxD_OUT…] [--rounds N]
"""

from __future__ import annotations

import argparse
import csv
import itertools
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from dynrank import add_lora, apply_lora_kernel
from dynrank.kernels.backends import MEASURED

# Time of Triton / time of the other, at p = 0 and p > 0, on an H100 with M = 8192 tokens and d = 4096.
TARGETS = {"frozen": (1.22, 1.25), "PEFT": (0.82, 0.75), "PEFT autocast": (0.66, 0.58), "unsloth's order": (0.94, 0.94)}
OURS = {"ATen": "torch", "Triton": "triton"}
Function = Callable[[], object]


class Times(NamedTuple):
    """Medians over rounds, in microseconds."""

    gpu: float
    host: float
    captured: bool = True


class Row(NamedTuple):
    """What was measured for one size; ``times`` by the name of the layer."""

    # One layer, or one compiled layer.
    what: str
    d_in: int
    d_out: int
    tokens: int
    rank: int
    p: float
    times: Mapping[str, Times]


def main() -> None:
    """Measure, print and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "4096x14336", "14336x4096", "2048x2048"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch sees no GPU; run it where one is, or set --device cpu for small sizes")
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    card = torch.cuda.get_device_name() if options.device == "cuda" else "CPU (small sizes)"
    rows = []
    known = measured_sizes(MEASURED, card)
    for (d_in, d_out), tokens, rank, p in itertools.product(shapes, options.tokens, options.ranks, (0.0, 0.1)):
        if tuple(map(str, (d_in, d_out, tokens, rank, p))) in known:
            continue
        layers = one_layer(d_in, d_out, rank, p, options.device)
        rows.append(_row("one layer", layers, d_in, d_out, tokens, rank, p, options))
        print(markdown(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
        if options.device == "cuda":
            append(rows[-1:], card, MEASURED)
    d_in, d_out = shapes[0]
    tokens = max(options.tokens)
    rank = options.ranks[0]
    if options.device == "cuda":
        for p in (0.0, 0.1):
            compiled = {name: torch.compile(f) for name, f in one_layer(d_in, d_out, rank, p, "cuda").items()}
            rows.append(_row("one layer, compiled", compiled, d_in, d_out, tokens, rank, p, options))
    print(f"{card}, torch {torch.__version__}: bfloat16, forward + backward\n\n{markdown(rows)}")
    if options.device == "cuda":
        print(f"\n{bandwidths(d_in, tokens, rank)}")


def markdown(rows: Sequence[Row]) -> str:
    """The table: GPU time of each layer / that of the frozen one, what Triton's may be, and host times / PEFT's."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row.times) if name != "frozen"]
    heading = ["layers", "d", "M", "r", "p", "frozen µs", *names, "target", "host / PEFT"]
    lines = [heading, ["---"] * len(heading)]
    for row in rows:
        frozen = row.times["frozen"]
        peft = row.times["PEFT"]
        cells = [
            ""
            if name not in row.times
            else f"{row.times[name].gpu / frozen.gpu:.2f}{'' if row.times[name].captured else ' eager'}"
            for name in names
        ]
        host = row.times["Triton" if "Triton" in row.times else "ATen"].host / peft.host
        size = [row.what, f"{row.d_in} → {row.d_out}", str(row.tokens), str(row.rank), str(row.p), f"{frozen.gpu:.0f}"]
        lines.append([*size, *cells, _targets(row), f"{host:.2f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _targets(row: Row) -> str:
    """Triton's time / that of others, with the most that it may be, at the size that there are targets for."""
    if row[:4] != ("one layer", 4096, 4096, 8192) or "Triton" not in row.times:
        return ""
    targets = {name: pair[row.p > 0] for name, pair in TARGETS.items() if name in row.times}
    triton = row.times["Triton"].gpu
    return ", ".join(f"{triton / row.times[name].gpu:.2f} of {name} (at most {t})" for name, t in targets.items())


def append(rows: Sequence[Row], card: str, measured: Path) -> None:
    """Add what ``auto`` decides from to the file: single layers that both ATen and Triton ran."""
    with measured.open("a", encoding="utf-8", newline="") as file:
        for row in rows:
            if row.what == "one layer" and {*OURS} <= {*row.times}:
                gpu = [f"{row.times[name].gpu:.1f}" for name in ("frozen", "PEFT", "ATen", "Triton")]
                csv.writer(file, lineterminator="\n").writerow([card, *row[1:6], *gpu])


def measured_sizes(measured: Path, card: str) -> set[tuple[str, ...]]:
    """(d_in, d_out, tokens, rank, p) as text, of the rows of this card."""
    with measured.open(encoding="utf-8", newline="") as file:
        return {tuple(row[1:6]) for row in csv.reader(file) if row[0] == card}


def one_layer(d_in: int, d_out: int, rank: int, p: float, device: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """The layers by name; Triton's on a GPU alone, and unsloth's where it does not fall back to PEFT's."""

    def base() -> nn.Module:
        return nn.Sequential(nn.Linear(d_in, d_out, bias=False)).to(device, torch.bfloat16).requires_grad_(False)

    def peft() -> nn.Module:
        return _trained(get_peft_model(base(), LoraConfig(r=rank, target_modules=["0"], lora_dropout=p)))

    def ours(backend: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
        size = {"rank": rank, "target_modules": ["0"], "dropout": p, "backend": backend, "dtype": dtype}
        return _trained(add_lora(base(), **size))  # type: ignore[arg-type]

    layers = {
        "frozen": base(),
        "ATen": ours("torch"),
        "PEFT": peft().bfloat16(),
        "PEFT with the op": apply_lora_kernel(peft().bfloat16()),
        "PEFT autocast": _Autocast(peft(), device),
        "PEFT autocast with the op": _Autocast(apply_lora_kernel(peft()), device),
    }
    if device == "cuda":
        layers |= {"Triton": ours("triton"), "Triton, float32 adapter": ours("triton", torch.float32)}
    if not p:
        layers["unsloth's order"] = _Reordered(d_in, d_out, rank).to(device)
    return layers  # type: ignore[return-value]


def _row(
    what: str, layers: Mapping[str, Callable[[Tensor], Tensor]], d_in: int, d_out: int, tokens: int, rank: int,
    p: float, options: argparse.Namespace,
) -> Row:  # fmt: skip
    x = torch.randn(tokens, d_in, dtype=torch.bfloat16, device=options.device, requires_grad=True)
    dy = torch.randn(tokens, d_out, dtype=torch.bfloat16, device=options.device)

    def step(layer: Callable[[Tensor], Tensor]) -> Function:
        leaves = [x, *(each for each in getattr(layer, "parameters", list)() if each.requires_grad)]

        def forward_and_backward() -> object:
            return torch.autograd.grad(layer(x), leaves, dy)

        return forward_and_backward

    steps = {name: step(layer) for name, layer in layers.items()}
    return Row(what, d_in, d_out, tokens, rank, p, measure(steps, options.rounds, options.device))


def measure(functions: Mapping[str, Function], rounds: int, device: str) -> dict[str, Times]:
    """Times of each function; on a CPU the time that has passed stands for the GPU's."""
    graphs = {name: _captured(function) if device == "cuda" else None for name, function in functions.items()}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name in random.sample(list(functions), len(functions)):
            start = time.thread_time()
            functions[name]()
            host = time.thread_time() - start
            taken[name].append((_passed(graphs[name] or functions[name], device), 1e6 * host))
    return {
        name: Times(*map(statistics.median, zip(*pairs, strict=True)), device == "cpu" or graphs[name] is not None)
        for name, pairs in taken.items()
    }


def _captured(function: Function) -> Function | None:
    """The function as a CUDA graph; None where it reads a number of the GPU's or of a generator on the host."""
    side = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph):
            function()
    except RuntimeError as error:
        print(f"not captured: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    return graph.replay


def _passed(function: Function, device: str) -> float:
    """Microseconds from before to after."""
    if device == "cpu":
        start = time.perf_counter()
        function()
        return 1e6 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * begin.elapsed_time(end)


def bandwidths(width: int, tokens: int, rank: int) -> str:
    """GB/s of each of Triton's kernels: the bytes of x over its time, by torch's profiler."""
    lines = ["| kernel | p | µs | GB/s |", "| --- | --- | --- | --- |"]
    for p in (0.0, 0.1):
        layer = one_layer(width, width, rank, p, "cuda")["Triton"]
        x = torch.randn(tokens, width, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        layer(x).sum().backward()
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            for _ in range(20):
                layer(x).backward(torch.ones_like(x))
        for event in recorded.key_averages():
            if event.key.split("_kernel")[0] in ("shrink", "expand", "grad_A"):
                microseconds = event.device_time_total / event.count
                lines.append(f"| {event.key} | {p} | {microseconds:.1f} | {x.nbytes / microseconds / 1e3:.0f} |")
    return "\n".join(lines)


def _trained(model: nn.Module) -> nn.Module:
    """B is zero in a new adapter, and a layer that multiplies zeros may be faster than one that does not."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return model.train()


class _Autocast(nn.Module):
    """PEFT's default: float32 adapters under bfloat16 autocast."""

    def __init__(self, layer: nn.Module, device: str) -> None:
        super().__init__()
        self.layer = layer
        self.device = device

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16):
            y: Tensor = self.layer(x)
            return y


class _Reordered(nn.Module):
    """The order of unsloth's layer (github.com/unslothai/unsloth, fast_lora.py): frozen product first, S made twice."""

    def __init__(self, d_in: int, d_out: int, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_out, d_in, dtype=torch.bfloat16) / d_in**0.5, requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(rank, d_in, dtype=torch.bfloat16) / d_in**0.5)
        self.lora_B = nn.Parameter(torch.randn(d_out, rank, dtype=torch.bfloat16) * 0.01)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _ReorderedFunction.apply(x, self.weight, self.lora_A, self.lora_B, 2.0)
        return y


class _ReorderedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(x, weight, lora_A, lora_B)
        ctx.scaling = scaling
        return (x @ weight.mT).addmm_(x @ lora_A.mT, lora_B.mT, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B = ctx.saved_tensors
        (dy,) = grads
        d_A = ctx.scaling * ((dy @ lora_B).mT @ x)
        d_B = ctx.scaling * (dy.mT @ (x @ lora_A.mT))
        dx = (dy @ weight).addmm_(dy @ lora_B, lora_A, alpha=ctx.scaling)
        return dx, None, d_A, d_B, None


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
