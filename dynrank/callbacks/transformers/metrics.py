"""What a Trainer logs and evaluates that triggers read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from transformers import TrainerState

from dynrank.callbacks.transformers.training import with_own_names
from dynrank.driver.driver import RankDriver
from dynrank.driver.metrics import TRAIN_LOSS, TrainingLoss


class Metrics:
    """The metrics that triggers have not read yet."""

    def __init__(self) -> None:
        # Of evaluations, of all data sets, since the last step.
        self._evaluated: dict[str, float] = {}
        self._loss = TrainingLoss()
        # The step of the last loss; the Trainer logs a mean over the steps since then.
        self._logged_step = 0
        # Whether a step has begun: before it, ``eval_on_start`` evaluates again what the checkpoint has evaluated.
        self._has_begun = False

    def begin(self, state: TrainerState) -> None:
        """Training begins."""
        self._logged_step = state.global_step
        self._has_begun = False

    def step_begins(self) -> bool:
        """A step begins; returns whether it is the first one."""
        is_first = not self._has_begun
        self._has_begun = True
        return is_first

    def log(self, loss: float, state: TrainerState, driver: RankDriver, *, evaluates: bool) -> None:
        """Take a logged ``loss``, unless it is also of steps before a change.

        Where the Trainer never ``evaluates``, a trigger that reads the loss alone reads it now.
        """
        changes = [event.step for event in driver.history if not event.undone]
        if not changes or changes[-1] <= self._logged_step:
            self._loss.add(loss, state.global_step - self._logged_step)
        self._logged_step = state.global_step
        if not evaluates and {*driver.observed} == {TRAIN_LOSS}:
            self._evaluated[TRAIN_LOSS] = self._loss.look()

    def forget_loss(self) -> None:
        """Ranks have changed."""
        self._loss.forget()

    def evaluated(self, metrics: Mapping[str, Any], monitors: Collection[str]) -> None:
        """Take the ``metrics`` of an evaluation, unless a program has evaluated other data, with their own prefix."""
        found = with_own_names(metrics)
        is_read = any(name.startswith("eval_") for name in found) or not found.keys().isdisjoint(monitors)
        if self._has_begun and is_read:
            self._evaluated |= found

    def look(self) -> dict[str, float]:
        """What triggers read now; empty if nothing was evaluated."""
        found = self._evaluated
        self._evaluated = {}
        if found:
            found.setdefault(TRAIN_LOSS, self._loss.look())
        return found

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"evaluated": self._evaluated, "loss": self._loss.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        self._evaluated = dict(state["evaluated"])
        self._loss.load_state_dict(state["loss"])
