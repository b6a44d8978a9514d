"""A short ramp of the learning rate after a change of rank, on top of whatever schedule runs."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


class Rewarmup:
    """Multiplies the rate of the next ``steps`` optimizer steps by 1/(steps + 1), 2/(steps + 1), ...

    The rate is lowered just before a step and put back just after it, so the schedule never sees the lowered value.

    Args:
        optimizer: the optimizer to hook.
        steps: length of the ramp, optimizer steps.
        done: steps of the ramp that were made before (on resume).
    """

    def __init__(self, optimizer: Optimizer, steps: int, done: int = 0) -> None:
        self.steps, self.done = steps, done
        self._rates: list[Any] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._lower),
            optimizer.register_step_post_hook(self._restore),
        ]

    @property
    def finished(self) -> bool:
        return self.done >= self.steps

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _lower(self, optimizer: Optimizer, *_: Any) -> None:
        if self.finished:  # the hooks stay: torch cannot lose one while it runs them
            return
        self._rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * (self.done + 1) / (self.steps + 1)

    def _restore(self, optimizer: Optimizer, *_: Any) -> None:
        if self.finished:
            return
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
        self.done += 1
