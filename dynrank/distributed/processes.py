"""Exchange of values and tensors between the processes of a training run (torch's default group).

Every function is collective: all processes must call it, in the same order. In a single process nothing is sent.
"""

import pickle
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
    """The result of ``make``, which runs only in process 0; an error there is raised in all processes.

    The result is pickled; tensors in it should be on the CPU. Every error, KeyboardInterrupt included, is sent to the
    other processes, so that none of them waits forever. Instead of an error that cannot be pickled, they raise a
    RuntimeError with its text.
    """
    if process_count() == 1:
        return make()
    outcome, failure = [b""], None
    if process_index() == 0:
        try:
            outcome = [pickle.dumps((make(), None))]
        except BaseException as error:
            failure, outcome = error, [_pickled_error(error)]
    distributed.broadcast_object_list(outcome, src=0)
    result: tuple[T, BaseException | None] = pickle.loads(outcome[0])
    if failure or result[1]:
        raise failure or result[1]  # type: ignore[misc]
    return result[0]


def _pickled_error(error: BaseException) -> bytes:
    try:
        outcome = pickle.dumps((None, error))
        # Some errors can be pickled but not unpickled, so process 0 tries it.
        pickle.loads(outcome)
    except Exception:
        outcome = pickle.dumps((None, RuntimeError(f"{type(error).__name__} in process 0: {error}")))
    return outcome


def from_all(value: T) -> list[T]:
    """``value`` of every process, in the order of their numbers; values are pickled as in :func:`from_first`."""
    if process_count() == 1:
        return [value]
    values: list[Any] = [None] * process_count()
    distributed.all_gather_object(values, value)
    return values


def mean_over_processes(value: float) -> float:
    """The mean of every process's ``value``, with the same bits in all processes."""
    values = from_all(value)
    return sum(values) / len(values)


@torch.no_grad()
def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Copy the values of ``tensors`` in process 0 to all processes; shapes must be equal."""
    if process_count() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor, src=0)


@torch.no_grad()
def average_over_processes(tensors: Iterable[Tensor]) -> None:
    """Replace each of ``tensors`` by its mean over all processes, in one message for each device and dtype."""
    if process_count() == 1:
        return
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for alike in kinds.values():
        message = torch.cat([tensor.flatten() for tensor in alike])
        distributed.all_reduce(message)
        means = torch.split(message.div_(process_count()), [tensor.numel() for tensor in alike])
        for tensor, mean in zip(alike, means, strict=True):
            tensor.copy_(mean.view_as(tensor))
