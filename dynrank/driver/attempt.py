"""A change of ranks on trial: made, checked by a validation if required, and undone unless it is kept."""

from __future__ import annotations

import random
from collections.abc import Mapping
from math import isfinite

import numpy as np
import torch

from dynrank.change.choice import Choice
from dynrank.change.replacement import Snapshot, uninterrupted
from dynrank.change.report import LayerReport
from dynrank.change.resize import resize
from dynrank.distributed.agreement import check_processes
from dynrank.driver.event import RankEvent
from dynrank.driver.metrics import CHECK_MONITOR, value
from dynrank.driver.training import Batches, Training
from dynrank.schedules import How


class Trial:
    """A ``with`` block in which ranks may change; its end restores them, also after an error or Ctrl-C.

    Ranks, factors, optimizer state and averages are restored bit for bit. An interrupt may come while the block ends,
    so enter it twice: ``with trial, trial:``.
    """

    def __init__(self, training: Training) -> None:
        self._training = training
        self._before: Snapshot | None = None

    def keep(self) -> None:
        """Keep the present state: the end of the block then restores nothing."""
        self._before = None

    def undo(self) -> None:
        """Restore the state at the start of the block; another change may be tried then."""
        if self._before is not None:
            with uninterrupted():
                self._training.before_resize()
                self._before.restore()
                self._training.after_resize()

    def __enter__(self) -> None:
        self._before = self._before or Snapshot(
            self._training.model, self._training.optimizers, self._training.averages
        )

    def __exit__(self, *_: object) -> None:
        self.undo()
        self.keep()


def validate(training: Training, monitor: str) -> tuple[Mapping[str, float], Batches]:
    """Validate for a change, and restore the random generators and the model's buffers afterwards.

    So all validations for one change draw the same random numbers, and shuffled data come in the same order.
    """
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    buffers = [(buffer, buffer.clone()) for buffer in training.model.buffers() if buffer.device.type != "meta"]
    try:
        return training.validate_batches(monitor)
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)
        for buffer, before in buffers:
            if not torch.equal(buffer, before):
                buffer.copy_(before)


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
    choice: Choice,
    check: Check | None,
) -> RankEvent:
    """Change the ranks to ``targets``; the event says whether the change was undone.

    Args:
        training: between an optimizer step and the next forward.
        trial: the change is made inside it.
        targets: {layer: new rank} for the layers that change.
        reason: why the ranks change, for the event.
        how: how the change is made.
        choice: which directions are kept.
        check: decides whether the change is undone; None: it is kept.
    """
    model, step = training.model, training.step
    check_processes(model, training.optimizers, f"before the change of rank at step {step}")
    reports = change(training, targets, how, choice)
    check_processes(model, training.optimizers, f"after the change of rank at step {step}")
    undone = check.too_much() if check is not None else None
    if undone is not None:
        trial.undo()
    elif check is not None:
        for metrics in check.measured.values():
            training.record(metrics)
    return RankEvent(step, f"{undone} ({reason})" if undone else reason, tuple(reports), undone is not None)


def change(training: Training, targets: Mapping[str, int], how: How, choice: Choice) -> list[LayerReport]:
    """Resize to ``targets``; return a report for each layer."""
    training.before_resize()
    reports = resize(
        training.model,
        targets,
        optimizers=training.optimizers,
        optimizer_state=how.optimizer_state,
        gates=choice,
        averages=training.averages,
        generator=torch.Generator().manual_seed(training.step),
        collective=True,
    )
    training.after_resize()
    return reports
