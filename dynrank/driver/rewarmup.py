"""The learning rate around a change of rank: a short ramp after it, and a warning where there is too little left."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from dynrank.driver.training import Training

LOW_RATE = 0.1  # below this share of the starting learning rate, a drop has little left to recover with


class Rewarmup:
    """Multiplies the rate of the next ``steps`` optimizer steps by 1/(steps + 1), 2/(steps + 1), ...

    The rate is lowered just before a step and put back just after it, so schedulers never see the lowered value.

    Args:
        optimizer: the optimizer to hook.
        steps: length of the ramp, optimizer steps.
        done: steps of the ramp that were made before (on resume).
    """

    def __init__(self, optimizer: Optimizer, steps: int, done: int = 0) -> None:
        self.steps, self.done = steps, done
        self._rates: list[Any] = []
        before, after = optimizer.register_step_pre_hook, optimizer.register_step_post_hook
        self._handles = [before(self._lower), after(self._restore)]

    def remove(self) -> None:
        """End the ramp now."""
        for handle in self._handles:
            handle.remove()

    def _lower(self, optimizer: Optimizer, *_: Any) -> None:
        if self.done < self.steps:  # the hooks stay after that: torch cannot lose one while it runs them
            self._rates = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * (self.done + 1) / (self.steps + 1)

    def _restore(self, optimizer: Optimizer, *_: Any) -> None:
        if self.done < self.steps:
            for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate
            self.done += 1


def warn_of_low_rate(training: Training) -> None:
    """Warn if every learning rate has decayed so far that the model cannot recover from a change."""
    groups = [group for optimizer in training.optimizers for group in optimizer.param_groups]
    rates = [(float(group["lr"]), float(group.get("initial_lr", group["lr"]))) for group in groups]
    share = min((now / start for now, start in rates if start > 0), default=1.0)
    if share < LOW_RATE:
        training.warn(
            f"the learning rate at the change of rank is {share:.1%} of its start, too little to recover with; "
            "set an earlier schedule.deadline or a later decay (optimizer.decay)"
        )
