"""The bisection of ``schedule=auto``: it finds by trials how few directions are enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, sqrt

import torch

from dynrank.change.choice import Choice
from dynrank.change.report import LayerReport
from dynrank.distributed.processes import from_all
from dynrank.driver.attempt import Check, Trial, attempt, change, validate
from dynrank.driver.event import RankEvent
from dynrank.driver.training import Batches, Training
from dynrank.layers.base import width_of
from dynrank.layers.finding import lora_layers
from dynrank.schedules import How


def cut_to_smallest(
    training: Training,
    trial: Trial,
    order: Sequence[tuple[str, int]],
    targets: Mapping[str, int],
    reason: str,
    how: How,
    choice: Choice,
    parameters_before: int,
) -> RankEvent:
    """Cut to the fewest steps of ``order`` that are enough; the event says "undone" if all of them are needed.

    Each trial makes the whole change, validates it, and undoes it bit for bit. The cut is within the tolerance; with
    one step less it was not. A still smaller number of steps could pass by chance; it is not tried.

    Args:
        training: between an optimizer step and the next forward.
        trial: the cuts are made inside it.
        order: (layer, its next rank) for each step up from ``targets``; the step that the loss needs most is first.
        targets: {layer: lowest rank} for the layers that change if no step is taken.
        reason: why the ranks change, for the event.
        how: how changes are made; its ``max_regression`` is the tolerance.
        choice: which directions each number of steps keeps.
        parameters_before: parameters of the adapters when the run began.
    """
    layers, monitor = dict(lora_layers(training.model)), how.check_monitor
    metrics, batches = validate(training, monitor)
    check, trials = Check(training, how, metrics), dict[int, tuple[float, float | None, list[LayerReport]]]()

    def after(steps: int) -> dict[str, int]:
        ranks = dict(targets) | dict(order[:steps])
        return {name: rank for name, rank in ranks.items() if rank != layers[name].rank}

    def tried(steps: int) -> float:
        reports = change(training, after(steps), how, choice)
        metrics, cut = validate(training, monitor)
        trial.undo()
        alike = [which for _, *which in batches] == [which for _, *which in cut]
        trials[steps] = check.value(metrics), standard_error(batches, cut) if alike else inf, reports
        return trials[steps][0]

    # Invariant: `high` steps pass the check. Taking every step keeps all directions that may be kept.
    low, high = 0, len(order)
    while low < high:
        steps = (low + high) // 2
        low, high = (low, steps) if check.allows(tried(steps)) else (steps + 1, high)
    end = high if after(high) else high - 1
    if end not in trials:
        tried(end)

    if end == 0 and check.allows(value := check.value(without_adapter(training, trial, monitor))):
        training.warn(
            f"{monitor} is {check.before:.4g}, and {value:.4g} without any adapter: a tolerance of "
            f"{how.max_regression:g} is more than the adapter has learned, so the ranks stay as they are; train "
            "longer, or set schedule.tolerance lower"
        )
        found = f"{monitor} {check.before:.4g} → {value:.4g} without any adapter is within the tolerance, too"
        return RankEvent(training.step, f"undone: {found} ({reason})", tuple(trials[end][2]), undone=True)
    value, noise, reports = trials[end]
    if any(noise == inf for _, noise, _ in trials.values()):
        training.warn(
            "the validations of schedule=auto did not use the same batches, so chance has decided how far ranks were "
            "cut; let every validation use the same data in the same order"
        )
    elif noise is not None and noise > check.most:
        training.warn(
            f"a tolerance of {how.max_regression:g} lets {monitor} get worse by {check.most:.2g}, less than the "
            f"standard error {noise:.2g} of that difference over the validated batches, so chance has decided how far "
            "ranks were cut; set schedule.tolerance higher, or validate more data"
        )
    now = sum(layer.rank for layer in layers.values())
    kept = sum(after(end).get(name, layer.rank) for name, layer in layers.items())
    left = sum(after(end).get(name, layer.rank) * width_of(layer) for name, layer in layers.items())
    found = (
        f"{kept:,} of {now:,} directions, {left / parameters_before:.3f} of the bytes at the start, {monitor} "
        f"{check.before:.4g} → {value:.4g} ({(value - check.before) / abs(check.before):+.2%}, "
        f"{how.max_regression:.2%} allowed), measured against this run before this cut"
    )
    if end == high:
        return attempt(training, trial, after(end), f"{reason}: {found}", how, choice, None)
    return RankEvent(training.step, f"undone: {found} ({reason})", tuple(reports), undone=True)


@torch.no_grad()
def without_adapter(training: Training, trial: Trial, monitor: str) -> Mapping[str, float]:
    """The metrics of the model with the update of every layer set to zero."""
    for _, layer in lora_layers(training.model):
        layer.lora_B.zero_()
    metrics, _ = validate(training, monitor)
    trial.undo()
    return metrics


def standard_error(before: Batches, after: Batches) -> float | None:
    """Standard error, over all processes, of the mean difference between two validations of the same batches.

    None if fewer than two batches are known.
    """
    pairs = [pair for own in from_all([*zip(before, after, strict=True)]) for pair in own]
    if len(pairs) < 2:
        return None
    differences = [(new - old, weight) for (old, weight, _), (new, *_) in pairs]
    total = sum(weight for _, weight in differences)
    mean = sum(difference * weight for difference, weight in differences) / total
    spread = sum((weight / total * (difference - mean)) ** 2 for difference, weight in differences)
    return sqrt(spread * len(pairs) / (len(pairs) - 1))
