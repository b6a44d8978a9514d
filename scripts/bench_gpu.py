"""One LoRA layer on a GPU, forward and backward: beside the frozen linear, PEFT, and unsloth's order of operations.

A round runs all of them once, in an order that is drawn; the table has medians over rounds of the ratios within a round
beside the target for an H100 (roofline arithmetic in bfloat16), and the bytes that are saved for backward beyond x.
The last line is the step after a change of rank within a bucket, 32 to 24, beside the step before it.
No GPU: --device cpu runs the same code on small sizes, where the targets mean nothing.
Run: .venv/bin/python scripts/bench_gpu.py [--ranks 8 16 64] [--tokens M] [--width D] [--backends torch triton]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from bench_layer import frozen, ours, peft
from measuring import ratio, rounds, saved_bytes
from rich.table import Table
from torch import Tensor, nn

from dynrank import resize
from dynrank.errors import ConfigurationError
from dynrank.output.console import table_console

# ours / other, at p = 0 and p > 0, on an H100 with M = 8192 and d = 4096
TARGETS = {"frozen": (1.22, 1.25), "PEFT": (0.82, 0.75), "PEFT autocast": (0.66, 0.58), "unsloth's order": (0.94, None)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--backends", nargs="+", choices=["torch", "triton"])
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        sys.exit("error: torch sees no GPU; run it where one is, or set --device cpu for small sizes")
    tokens, width = options.tokens or (8192 if on_gpu else 64), options.width or (4096 if on_gpu else 64)
    backends = options.backends or (["torch", "triton"] if on_gpu else ["torch"])
    name = torch.cuda.get_device_name() if on_gpu else "CPU (small sizes)"
    table = Table(title=f"{name}: bfloat16, {tokens} tokens, d = {width}, forward + backward")
    for heading in ("r", "p", "backend", "other", "ours / other", "quartiles", "target", "ms", "saved beyond x"):
        table.add_column(heading, justify="left" if heading in ("backend", "other") else "right")
    for rank in options.ranks:
        for p in (0.0, 0.1):
            for backend in backends:
                try:
                    for row in _compare(backend, rank, p, tokens, width, options):
                        table.add_row(str(rank), str(p), *row)
                except ConfigurationError as error:
                    sys.exit(f"error: {error}")
    table_console().print(table)


def _compare(
    backend: str, rank: int, p: float, tokens: int, width: int, options: argparse.Namespace
) -> list[tuple[str, ...]]:
    dtype, device = torch.bfloat16, options.device
    narrow = peft(width, rank, p, dtype).to(dtype)
    layers: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": ours(width, rank, p, dtype, backend, dtype),
        "frozen": frozen(width, dtype),
        "PEFT": narrow,
        "PEFT autocast": _Autocast(peft(width, rank, p, dtype), device),
        "within a bucket": ours(width, rank, p, dtype, backend, dtype),
    }
    if not p:  # it falls back to PEFT's layer where there is dropout
        layers["unsloth's order"] = _Reordered(width, rank, dtype)
    for layer in layers.values():
        layer.to(device)  # type: ignore[attr-defined]
    resize(layers["within a bucket"], max(1, 3 * rank // 4))
    x = torch.randn(tokens, width, dtype=dtype, device=device, requires_grad=True)
    dy = torch.randn(tokens, width, dtype=dtype, device=device)
    seconds = rounds({name: lambda f=f: f(x).backward(dy) for name, f in layers.items()}, options.rounds)
    saved = saved_bytes(layers["ours"], x) - x.nbytes  # type: ignore[arg-type]
    rows = []
    for other in list(layers)[1:]:
        above, below = ("within a bucket", "ours") if other == "within a bucket" else ("ours", other)
        median, quartiles = ratio(seconds[above], seconds[below])
        target = TARGETS.get(other, (1.01, 1.01))[p > 0]
        label = f"rank {max(1, 3 * rank // 4)} after a change / rank {rank}" if other == "within a bucket" else other
        rows.append((backend, label, f"{median:.3f}", quartiles, "" if target is None else f"{target:.2f}", "", ""))
    mine = 1e3 * statistics.median(seconds["ours"])
    rows[0] = (*rows[0][:-2], f"{mine:.3f}", f"{saved:,} (target {tokens * rank * 2 + 64:,})")
    return rows


class _Autocast(nn.Module):
    """PEFT's default: float32 adapters under bfloat16 autocast."""

    def __init__(self, layer: nn.Module, device: str) -> None:
        super().__init__()
        self.layer, self.device = layer, device

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16):
            y: Tensor = self.layer(x)
            return y


class _Reordered(nn.Module):
    """The order of unsloth's layer (github.com/unslothai/unsloth, fast_lora.py): frozen product first, S made twice."""

    def __init__(self, width: int, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width, dtype=dtype) / width**0.5, requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(rank, width, dtype=dtype) / width**0.5)
        self.lora_B = nn.Parameter(torch.randn(width, rank, dtype=dtype) * 0.01)

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
