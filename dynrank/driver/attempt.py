"""One attempt to change ranks: make the change, check it by a validation if required, undo it if it costs too much."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

import torch

from dynrank.change.gates import Gates
from dynrank.change.report import LayerReport
from dynrank.change.resize import resize
from dynrank.distributed.agreement import check_processes
from dynrank.driver.event import RankEvent
from dynrank.driver.metrics import CHECK_MONITOR, value
from dynrank.driver.training import Training
from dynrank.driver.trial import Trial, validate
from dynrank.schedules import How


class Check:
    """Decides whether a change worsens the validated metric by more than the user allows.

    Args:
        training: the run before the change.
        how: names the metric, and the largest relative worsening.
        validated: metrics of these weights; None: they are validated here.

    Attributes:
        before: the metric before the change.
        most: largest worsening that is allowed.
        measured: metrics of the validations made for this check: before the change, and after the last attempt.
    """

    def __init__(self, training: Training, how: How, validated: Mapping[str, float] | None) -> None:
        self._training, self._how = training, how
        before = validate(training, how.check_monitor)[0] if validated is None else validated
        self.measured = {"before": before} if validated is None else {}
        self.before = self.value(before)
        self.most = (how.max_regression or 0.0) * abs(self.before)

    def too_much(self) -> str | None:
        """Validate the changed weights; return why the change has to be undone, or None."""
        self.measured["after"], _ = validate(self._training, self._how.check_monitor)
        after = self.value(self.measured["after"])
        if self.allows(after):
            return None
        return f"undone: {self._how.check_monitor} {self.before:.4g} → {after:.4g}"

    def allows(self, after: float) -> bool:
        """Whether the metric may change from ``before`` to ``after``; never if one of the two is not finite."""
        worse = after - self.before if self._how.check_mode == "min" else self.before - after
        return isfinite(worse) and worse <= self.most

    def value(self, metrics: Mapping[str, float]) -> float:
        """The metric in ``metrics``, as the mean over all processes."""
        return value(metrics, self._how.check_monitor, {self._how.check_monitor: CHECK_MONITOR})


def attempt(
    training: Training,
    trial: Trial,
    targets: Mapping[str, int],
    reason: str,
    how: How,
    gates: Gates | None,
    check: Check | None,
) -> RankEvent:
    """Change the ranks to ``targets``; the event says whether the change was undone.

    Args:
        training: between an optimizer step and the next forward.
        trial: the change is made inside it.
        targets: {layer: new rank} for the layers that change.
        reason: why the ranks change, for the event.
        how: how the change is made.
        gates: the gates measured for this change; None if it needs none.
        check: decides whether the change is undone; None: it is kept.
    """
    model, step = training.model, training.step
    check_processes(model, training.optimizers, f"before the change of rank at step {step}")
    reports = change(training, targets, how, gates)
    check_processes(model, training.optimizers, f"after the change of rank at step {step}")
    undone = check.too_much() if check is not None else None
    if undone is not None:
        trial.undo()
    elif check is not None:
        for metrics in check.measured.values():
            training.record(metrics)
    return RankEvent(step, f"{undone} ({reason})" if undone else reason, tuple(reports), undone is not None)


def change(training: Training, targets: Mapping[str, int], how: How, gates: Gates | None) -> list[LayerReport]:
    """Resize to ``targets``; return a report for each layer."""
    training.before_resize()
    reports = resize(
        training.model,
        targets,
        optimizers=training.optimizers,
        optimizer_state=how.optimizer_state,
        gates=gates,
        averages=training.averages,
        generator=torch.Generator().manual_seed(training.step),
        collective=True,
    )
    training.after_resize()
    return reports


def gentler(ranks: Mapping[str, int], refused: Mapping[str, int], multiple: int) -> dict[str, int]:
    """Ranks halfway between ``ranks`` and ``refused``, rounded towards ``ranks``; unchanged layers are left out.

    Args:
        ranks: {layer: its rank now}.
        refused: {layer: rank that cost too much}.
        multiple: new ranks of a shrink are multiples of this, as in the target.
    """
    halves = {}
    for name, target in refused.items():
        rank = ranks[name]
        # int() rounds towards no change.
        half = rank + int((target - rank) / 2)
        if half < rank:
            half = min(rank, -(-half // multiple) * multiple)
        if half not in (rank, target):
            halves[name] = half
    return halves
