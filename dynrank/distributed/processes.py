"""The processes of a training run agreeing on values and tensors (torch's default group); in one process nothing moves.

Every function is collective: all processes call it, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


def process_count() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def process_index() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if process_count() > 1 else 0


def from_first(make: Callable[[], T]) -> T:
    """What ``make`` returns in process 0, where alone it runs; what it raises there is raised in all.

    Args:
        make: its result is pickled; tensors in it should be on the CPU.
    """
    if process_count() == 1:
        return make()
    made: list[Any] = [None, None]
    if process_index() == 0:
        try:
            made[0] = make()
        except (ValueError, RuntimeError) as error:
            made[1] = error
    distributed.broadcast_object_list(made, src=0)
    if made[1] is not None:
        raise made[1]
    result: T = made[0]
    return result


def from_all(value: T) -> list[T]:
    """``value`` of every process, in order; pickled as in :func:`from_first`."""
    if process_count() == 1:
        return [value]
    values: list[Any] = [None] * process_count()
    distributed.all_gather_object(values, value)
    return values


def gathered(value: T) -> list[T]:
    """``value`` of every process in process 0, an empty list in the others; tensors in dicts arrive on the CPU."""
    if process_count() == 1:
        return [value]
    values: list[Any] = [None] * process_count() if process_index() == 0 else []
    distributed.gather_object(_on_cpu(value), values or None, dst=0)
    return values


def mean_over_processes(value: float) -> float:
    """The mean of every process's ``value``, the same bits in all."""
    values = from_all(value)
    return sum(values) / len(values)


@torch.no_grad()
def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Give ``tensors``, of equal shapes in all processes, the values that they have in process 0."""
    if process_count() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor, src=0)


@torch.no_grad()
def sum_over_processes(tensors: Iterable[Tensor]) -> None:
    """Replace each of ``tensors`` by its sum over all processes."""
    if process_count() > 1:
        for tensor in tensors:
            distributed.all_reduce(tensor)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _on_cpu(member) for key, member in value.items()}
    return value.cpu() if isinstance(value, Tensor) else value
