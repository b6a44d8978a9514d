"""Two choices that measurements make: whether the op pays for an input, and which module makes its products."""

import csv
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from dynrank.errors import ConfigurationError
from dynrank.kernels import torch_backend, triton_launch

Backend = Literal["auto", "torch", "triton", "reference"]


class Size(NamedTuple):
    """The smallest input of a linear layer for which the op pays."""

    tokens: int
    # tokens * the smaller of d_in and d_out
    elements: int


class ExpertSize(NamedTuple):
    """For which inputs of a module of experts the op pays."""

    # The fewest columns of a row.
    width: int
    # The most rows of an expert, on average, for each column.
    rows_by_width: float


def _rows(name: str) -> list[dict[str, str]]:
    with Path(__file__).with_name(name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# scripts/bench/gpu.py appends rows to this file.
MEASURED = Path(__file__).with_name("measured.csv")
# For a CPU, as scripts/bench/sizes.py has written them: {(dtype of the weight, dtype of the products, whether there is
# dropout): the smallest size for which the op pays}, and {dtype: the inputs of experts for which it does}.
CPU_SIZES = {
    (getattr(torch, row["weight"]), getattr(torch, row["computes"]), row["dropout"] == "yes"): Size(
        int(row["tokens"]), int(row["elements"])
    )
    for row in _rows("sizes.csv")
}
CPU_EXPERTS = {
    getattr(torch, row["weight"]): ExpertSize(int(row["width"]), float(row["rows_by_width"]))
    for row in _rows("expert_sizes.csv")
}
_LEAST_ELEMENTS = min(size.elements for size in CPU_SIZES.values())


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


def may_pay(x: Tensor) -> bool:
    """Whether :func:`op_pays` can hold for ``x``, by the smallest size of all dtypes: a check that costs little."""
    return x.device.type != "cpu" or x.numel() >= _LEAST_ELEMENTS


def op_pays(x: Tensor, d_out: int, weight: torch.dtype, dropout: bool) -> bool:
    """Whether the op was measured to be at least as fast as PEFT's layer for an input of the size of ``x``.

    Below this size the time of a layer is that of its calls, and the op, a node that is written in Python, has dearer
    ones than plain operations. On a CPU the sizes are those of ``sizes.csv``, which was measured with one thread and
    two; a dtype that it lacks does not pay. On a GPU the op always counts as faster, which no GPU has measured yet.

    Args:
        x: (..., d_in), the input of a linear layer.
        d_out: the width of its output. Only square layers were measured, so the smaller width counts.
        weight: the dtype of the layer's weight.
        dropout: whether elements of x are dropped.
    """
    # Not x.is_cpu, which is False for the tensors without values of the plan.
    if x.device.type != "cpu":
        return True
    computes = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    size = CPU_SIZES.get((weight, computes, dropout))
    tokens = x.shape[:-1].numel()
    return size is not None and tokens >= size.tokens and tokens * min(x.shape[-1], d_out) >= size.elements


def experts_pay(x: Tensor, rows: float) -> bool:
    """Whether the op was measured to be at least as fast in a module of experts as PEFT's sum of weights and updates.

    PEFT's time is that of the weights, the op's that of the rows. As in :func:`op_pays`, by ``expert_sizes.csv``.

    Args:
        x: (tokens, d), the input of the module.
        rows: how many rows each expert gets, on average.
    """
    size = CPU_EXPERTS.get(x.dtype)
    width = x.shape[-1]
    return x.device.type != "cpu" or (size is not None and width >= size.width and rows <= size.rows_by_width * width)


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
