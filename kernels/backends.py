"""Who makes the rank-sized products of a LoRA layer: ATen, on any device, or Triton's kernels on a GPU."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from dynrank.errors import ConfigurationError
from dynrank.kernels import torch_backend, triton_launch

BACKENDS = ("auto", "torch", "triton")
# scripts/bench_gpu.py appends rows to it.
MEASURED = Path(__file__).with_name("measured.csv")


def check_backend(backend: str) -> str:
    """``backend``, if it is one."""
    if backend not in BACKENDS:
        raise ConfigurationError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}; set lora.backend")
    return backend


def products_of(backend: str, x: Tensor, rank: int) -> ModuleType:
    """The module that makes the products.

    ``auto`` is Triton's kernels where they serve ``x`` and this card's measurements say that they pay, else ATen.
    """
    check_backend(backend)
    pays = backend == "triton"
    if backend == "auto" and x.is_cuda:
        pays = x.numel() >= paying_size(torch.cuda.get_device_name(x.device))
    if not pays:
        return torch_backend
    fault = triton_launch.serves(x, rank)
    if fault is None:
        return triton_launch
    if backend == "auto":
        return torch_backend
    raise ConfigurationError(f"{fault}; set lora.backend=torch, or auto")


@cache
def paying_size(card: str, measured: Path = MEASURED) -> float:
    """Elements of x from which on every row of ``measured`` for this card has Triton ahead of ATen; inf if none has."""
    with measured.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["gpu"] == card]
    ahead = {True: [float("inf")], False: [0.0]}
    for row in rows:
        ahead[float(row["triton_us"]) < float(row["torch_us"])].append(int(row["tokens"]) * int(row["d_in"]))
    return min(size for size in ahead[True] if size > max(ahead[False]))
