"""One change of ranks in a trainer: predicted, made, checked by validation if asked for, undone if it cost too much."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite

import torch
from lightning.pytorch import LightningModule, Trainer

from dynrank.agreement import check_processes
from dynrank.callbacks.strategies import unwrapped
from dynrank.layers.inject import lora_layers
from dynrank.resizing import LayerReport, Snapshot, predict, resize
from dynrank.schedules import How
from dynrank.statistics import Window


@dataclass(frozen=True)
class RankEvent:
    """One change of ranks.

    Attributes:
        step: optimizer steps made before it.
        reason: why it was made, or why it was undone.
        layers: what it did to each layer that it changed.
        undone: it cost too much and was taken back; the ranks are as before.
    """

    step: int
    reason: str
    layers: tuple[LayerReport, ...]
    undone: bool = False


def change_ranks(
    trainer: Trainer,
    pl_module: LightningModule,
    targets: Mapping[str, int],
    reason: str,
    how: How,
    window: Window | None,
    multiple: int,
    validated: Callable[[Trainer, str, bool], float],
) -> Iterator[RankEvent]:
    """Change to ``targets``, or as far as the check allows; yields each attempt, the last one may be a success.

    Args:
        trainer: between an optimizer step and the next forward.
        pl_module: holds the layers.
        targets: {layer: new rank} of those that change.
        reason: goes into the events.
        how: see there.
        window: what was measured for this change; None where nothing had to be.
        multiple: of which ranks tried instead of refused ones are multiples.
        validated: (trainer, monitor, whether ranks have changed since the last validation) -> the monitor's value.
    """
    step, ranks = trainer.global_step, {name: layer.rank for name, layer in lora_layers(pl_module)}
    grams = window.grams if window is not None else None
    metric = how.metric if grams is not None else "weight"
    along = {name: window.sketch.of(name) for name in targets} if window is not None and window.sketch else None
    before, snapshot = 0.0, None
    if how.max_regression is not None and targets:
        before = validated(trainer, how.check_monitor, False)
        snapshot = Snapshot(pl_module, trainer.optimizers)
    check_processes(pl_module, trainer.optimizers, f"before the change of rank at step {step}")
    while targets:
        predicted = predict(pl_module, targets, metric=metric, grams=grams)
        tell(trainer, pl_module, "on_rank_prediction", RankEvent(step, reason, tuple(predicted)))
        with unwrapped(trainer):
            reports = resize(
                pl_module,
                targets,
                optimizers=trainer.optimizers,
                metric=metric,
                grams=grams,
                gauge=how.gauge,
                along=along,
                optimizer_state=how.optimizer_state,
                generator=torch.Generator().manual_seed(step),
                collective=True,
            )
        check_processes(pl_module, trainer.optimizers, f"after the change of rank at step {step}")
        event = RankEvent(step, reason, tuple(reports))
        if snapshot is None or how.max_regression is None:
            yield event
            return
        after = validated(trainer, how.check_monitor, True)
        if isfinite(after) and after - before <= how.max_regression * abs(before):
            yield event
            return
        with unwrapped(trainer):
            snapshot.restore()
        cost = f"undone: {how.check_monitor} {before:.4g} → {after:.4g} ({reason})"
        yield RankEvent(step, cost, event.layers, undone=True)
        targets = _gentler(ranks, targets, multiple)


def tell(trainer: Trainer, pl_module: LightningModule, hook: str, event: RankEvent) -> None:
    """Call ``hook(trainer, pl_module, event)`` of every callback that defines it."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        told = getattr(callback, hook, None)
        if told is not None:
            told(trainer, pl_module, event)


def _gentler(ranks: Mapping[str, int], refused: Mapping[str, int], multiple: int) -> dict[str, int]:
    """Half as far, rounded towards the ranks now; layers that this leaves where they are drop out."""
    halves = {}
    for name, target in refused.items():
        rank = ranks[name]
        half = rank + int((target - rank) / 2)  # int() rounds towards no change
        if half < rank:
            half = min(rank, -(-half // multiple) * multiple)
        if half not in (rank, target):
            halves[name] = half
    return halves
