"""When to act on a metric: small state machines over plain numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from dynrank.errors import ConfigurationError


@dataclass
class Plateau:
    """True once a metric has not improved for ``patience`` observations in a row, after a warm-up.

    An observation improves when it beats the best one since the last change of rank by more than ``min_delta``,
    relative to the best (as torch's ReduceLROnPlateau with ``threshold_mode="rel"``, but for either sign of the
    metric).

    Args:
        monitor: name of a logged metric.
        mode: "min" if smaller is better, else "max".
        patience: observations without improvement before acting, >= 1.
        min_delta: relative improvement that counts, >= 0.
        warmup_steps: optimizer steps before which nothing is observed.
        cooldown_steps: optimizer steps after a change of rank during which nothing is observed.

    Raises:
        ConfigurationError: if a value is outside its range.
    """

    monitor: str = "val/loss"
    mode: str = "min"
    patience: int = 3
    min_delta: float = 0.01
    warmup_steps: int = 0
    cooldown_steps: int = 0
    _best: float | None = field(default=None, init=False, repr=False)
    _stale: int = field(default=0, init=False, repr=False)
    _deaf_until: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise ConfigurationError(f"mode must be min or max, got {self.mode!r}; set schedule.trigger.mode")
        for name, least in (("patience", 1), ("min_delta", 0), ("warmup_steps", 0), ("cooldown_steps", 0)):
            value = getattr(self, name)
            if value < least:
                raise ConfigurationError(f"{name} must be at least {least}, got {value}; set schedule.trigger.{name}")
        self._deaf_until = self.warmup_steps

    def observe(self, value: float, step: int) -> bool:
        """Take one observation, made after optimizer step ``step``; True when the metric has converged.

        A value that is not finite never improves on anything.
        """
        if step < self._deaf_until:
            return False
        if self._improves(value):
            self._best, self._stale = value, 0
        else:
            self._stale += 1
        return self._stale >= self.patience

    def reset(self, step: int) -> None:
        """Forget the history, since a change of rank at ``step`` moves the metric itself, and start the cooldown."""
        self._best, self._stale, self._deaf_until = None, 0, max(self.warmup_steps, step + self.cooldown_steps)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, safe under ``torch.load(weights_only=True)``."""
        return {"best": self._best, "stale": self._stale, "deaf_until": self._deaf_until}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._best, self._stale, self._deaf_until = state["best"], state["stale"], state["deaf_until"]

    def _improves(self, value: float) -> bool:
        if not isfinite(value):
            return False
        if self._best is None:
            return True
        gain = self._best - value if self.mode == "min" else value - self._best
        return gain > self.min_delta * abs(self._best)
