"""The choice of the module that makes a LoRA layer's products with A and B: ATen, or Triton's kernels on a GPU."""

import csv
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from dynrank.errors import ConfigurationError
from dynrank.kernels import torch_backend, triton_launch

Backend = Literal["auto", "torch", "triton", "reference"]
# scripts/bench/gpu.py appends rows to this file.
MEASURED = Path(__file__).with_name("measured.csv")


def products_of(backend: Backend, x: Tensor, rank: int) -> ModuleType:
    """The module that makes the products.

    ``auto`` is Triton's kernels where they support ``x`` and were faster on this GPU at this size, else ATen. With
    ``reference`` a linear layer does not use the op at all, see :meth:`dynrank.layers.kinds.LoRALinear.reference`.
    """
    if backend not in get_args(Backend):
        raise ConfigurationError(f"backend must be one of {get_args(Backend)}, got {backend!r}", "backend")
    if backend == "auto" and x.is_cuda and x.numel() >= paying_size(torch.cuda.get_device_name(x.device)):
        return torch_backend if triton_launch.unsupported(x, rank) else triton_launch
    if backend != "triton":
        return torch_backend
    fault = triton_launch.unsupported(x, rank)
    if fault:
        raise ConfigurationError(f'{fault}; set backend="torch" or "auto"', "backend")
    return triton_launch


@cache
def paying_size(card: str, measured: Path = MEASURED) -> float:
    """The smallest x.numel() above which Triton was faster in every row of ``measured`` for this GPU; inf if none."""
    with measured.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["gpu"] == card]
    sizes = {True: [float("inf")], False: [0.0]}
    for row in rows:
        triton_is_faster = float(row["triton_us"]) < float(row["torch_us"])
        sizes[triton_is_faster].append(int(row["tokens"]) * int(row["d_in"]))
    return min(size for size in sizes[True] if size > max(sizes[False]))
