"""How few directions are enough: the search by trials of ``schedule=auto``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt

from dynrank.change.gates import Gates
from dynrank.change.predict import predict
from dynrank.distributed.processes import from_all
from dynrank.driver.attempt import Check, attempt, change
from dynrank.driver.event import RankEvent
from dynrank.driver.training import Batches, Training
from dynrank.layers.finding import lora_layers
from dynrank.layers.ranked import width_of
from dynrank.schedules import How
from dynrank.targets import Smallest


def cut_to_smallest(
    training: Training,
    target: Smallest,
    order: Sequence[tuple[str, int]],
    targets: Mapping[str, int],
    reason: str,
    how: How,
    gates: Gates | None,
) -> RankEvent:
    """Cut to the fewest steps of ``order`` that are enough; the event is of an undone cut if all of them are needed.

    Each trial is the change as it would be made, validated, and taken back to the bit. The cut is within the tolerance,
    and that of one step less was not; whether a still smaller one is by chance, nobody has tried.

    Args:
        training: between an optimizer step and the next forward.
        target: what the stage asks for.
        order: (layer, its next rank) of the steps up, what is needed most first.
        targets: {layer: lowest rank} of those that change if no step is taken.
        reason: why, for the event.
        how: how changes are made; its ``max_regression`` is the tolerance.
        gates: those that were watched; None where none had to be.
    """
    layers, monitor = dict(lora_layers(training.model)), how.check_monitor
    metrics, batches = training.validate_batches(monitor, target.check_batches)
    check, trials = Check(training, how, metrics), dict[int, tuple[float, float | None]]()

    def after(steps: int) -> dict[str, int]:
        ranks = dict(targets) | dict(order[:steps])
        return {name: rank for name, rank in ranks.items() if rank != layers[name].rank}

    def tried(steps: int) -> float:
        change(training, after(steps), how, gates)
        try:
            metrics, cut = training.validate_batches(monitor, target.check_batches)
            trials[steps] = check.value(metrics), standard_error(batches, cut)
        finally:
            check.undo()
        return trials[steps][0]

    low, high = 0, len(order)  # with all steps nothing is lost but what layers have to lose
    while low < high:
        steps = (low + high) // 2
        low, high = (low, steps) if check.allows(tried(steps)) else (steps + 1, high)
    end = high if after(high) else high - 1
    if end not in trials:
        tried(end)

    value, noise = trials[end]
    if noise is not None and noise > check.most:
        training.warn(
            f"a tolerance of {target.tolerance:g} lets {monitor} get worse by {check.most:.2g}, less than the standard "
            f"error {noise:.2g} of that difference over the validated batches: how far ranks were cut is chance; set "
            "schedule.check_batches or schedule.tolerance higher"
        )
    ranks = {name: (layer.rank, after(end).get(name, layer.rank)) for name, layer in layers.items()}
    size = {n: width_of(layer) * layer.lora_A.element_size() / 1e6 for n, layer in layers.items()}
    before, kept = (sum(both[i] for both in ranks.values()) for i in (0, 1))
    held, left = (sum(both[i] * size[name] for name, both in ranks.items()) for i in (0, 1))
    found = (
        f"{kept:,} of {before:,} directions, {held:.2f} → {left:.2f} MB, {monitor} {check.before:.4g} → {value:.4g} "
        f"where {check.most:.2g} worse is allowed"
    )
    if end == high:
        return attempt(training, after(end), f"{reason}: {found}", how, gates, None)
    reports = predict(training.model, after(end), how=how, gates=gates)
    return RankEvent(training.step, f"undone: {found} ({reason})", tuple(reports), undone=True)


def standard_error(before: Batches, after: Batches) -> float | None:
    """Standard error of the mean difference between two validations of the same batches, of all processes.

    None if there are fewer than two batches, or their parts are not known.
    """
    pairs = [pair for own in from_all([*zip(before, after, strict=True)]) for pair in own]
    if len(pairs) < 2:
        return None
    differences = [(new - old, weight) for (old, weight), (new, _) in pairs]
    total = sum(weight for _, weight in differences)
    mean = sum(difference * weight for difference, weight in differences) / total
    spread = sum((weight / total * (difference - mean)) ** 2 for difference, weight in differences)
    return sqrt(spread * len(pairs) / (len(pairs) - 1))
