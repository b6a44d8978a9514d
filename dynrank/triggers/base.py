"""What all triggers that watch training have in common: a warm-up, a cooldown, and a history that a change clears."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from math import inf
from typing import Any, ClassVar

from dynrank.errors import ConfigurationError


def check_least(trigger: object, **least: float) -> None:
    """Refuse fields of a trigger below their least value.

    Raises:
        ConfigurationError: naming the field and its configuration key.
    """
    for name, limit in least.items():
        value = getattr(trigger, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not limit <= value < inf:
            raise ConfigurationError(
                f"{name} must be finite and at least {limit}, got {value!r}; set schedule.trigger.{name}"
            )


def check_count(trigger: object, **least: int) -> None:
    """Refuse fields of a trigger that are no whole number of at least so much.

    Raises:
        ConfigurationError: naming the field and its configuration key.
    """
    check_least(trigger, **least)
    for name in least:
        value = getattr(trigger, name)
        if not isinstance(value, int):
            raise ConfigurationError(f"{name} must be an int, got {value!r}; set schedule.trigger.{name}")


def check_name(trigger: object, *names: str) -> None:
    """Refuse a monitor that is no name of a metric.

    Raises:
        ConfigurationError: naming the field and its configuration key.
    """
    for name in names:
        value = getattr(trigger, name)
        if not isinstance(value, str) or not value:
            raise ConfigurationError(f"{name} must name a logged metric, got {value!r}; set schedule.trigger.{name}")


@dataclass(kw_only=True)
class Trigger:
    """A small state machine over plain values; all of its state is builtins and tensors.

    Args:
        warmup_steps: optimizer steps before which nothing is observed.
        cooldown_steps: optimizer steps after a change of rank during which nothing is observed.
    """

    warmup_steps: int = 0
    cooldown_steps: int = 0
    _deaf_until: int = field(default=0, init=False, repr=False)

    monitors: ClassVar[tuple[str, ...]] = ()  # names of the metrics that observe() takes, after each validation
    every: ClassVar[int] = 0  # steps between looks at the factors of all layers; 0: none

    def __post_init__(self) -> None:
        check_count(self, warmup_steps=0, cooldown_steps=0)
        self._deaf_until = self.warmup_steps

    @property
    def reason(self) -> str:
        """What is written into a run's history when the trigger fires."""
        raise NotImplementedError

    def observe(self, step: int, *seen: Any) -> bool:
        """Take one observation, made after optimizer step ``step``; True when it is time to act.

        Args:
            step: optimizer steps made.
            *seen: the values of :attr:`monitors` in their order; or one mapping, name -> (lora_B, lora_A).
        """
        return step >= self._deaf_until and self._fires(*seen)

    def reset(self, step: int) -> None:
        """Forget the history, since a change of rank at ``step`` moves what is observed, and start the cooldown."""
        self._forget()
        self._deaf_until = max(self.warmup_steps, step + self.cooldown_steps)

    def state_dict(self) -> dict[str, Any]:
        """Safe under ``torch.load(weights_only=True)``."""
        return {field.name: getattr(self, field.name) for field in fields(self) if not field.init}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def _fires(self, *seen: Any) -> bool:
        raise NotImplementedError

    def _forget(self) -> None:
        raise NotImplementedError
