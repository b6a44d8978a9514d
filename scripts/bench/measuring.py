"""Measurements of several things in one process and in turns, so that a noisy machine disturbs all alike."""

from __future__ import annotations

import csv
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

Function = Callable[[], object]


def rounds(
    functions: Mapping[str, Function], count: int, warm_up: int = 3, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each function in each of ``count`` rounds, which run all of them once, in a random order.

    With ``time.process_time`` as the ``clock`` they are seconds of the CPU, which other processes disturb less.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for index in range(count + warm_up):
        for name in random.sample(list(functions), len(functions)):
            _finish()
            start = clock()
            functions[name]()
            _finish()
            if index >= warm_up:
                seconds[name].append(clock() - start)
    return seconds


def ratio(above: Sequence[float], below: Sequence[float]) -> tuple[float, str]:
    """(median of the ratios within a round, their quartiles as text)."""
    low, median, high = statistics.quantiles([a / b for a, b in zip(above, below, strict=True)], n=4)
    return median, f"{low:.2f} to {high:.2f}"


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes that a forward keeps for its backward, each storage once, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    del y
    return sum(storages.values())


def peak_bytes(function: Function) -> int:
    """The most that ``function`` has allocated at one time, beyond what was there before; by torch's own count."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def append_row(file: Path, fields: Sequence[str], row: Sequence[str]) -> None:
    """Add a row, below a heading in a new file."""
    is_new = not file.exists()
    with file.open("a", encoding="utf-8", newline="") as rows:
        writer = csv.writer(rows, lineterminator="\n")
        if is_new:
            writer.writerow(fields)
        writer.writerow(row)


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
