"""What all triggers that watch training share: a warm-up, a cooldown, and a history that a change of rank clears."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import MISSING, Field, field, fields
from typing import Any

from dynrank.errors import Steps, validated


@validated("schedule.trigger", frozen=False, kw_only=True)
class Trigger(ABC):
    """A small state machine; write :meth:`fires`, and name the metrics that it is shown in ``monitors``.

    Its arguments are the fields that its constructor takes, its state is the other ones (``init=False``): plain values
    and tensors, with defaults that they go back to after a change.

    Args:
        warmup_steps: optimizer steps before which nothing is observed.
        cooldown_steps: optimizer steps after a change of rank during which nothing is observed.

    >>> class Below(Trigger):
    ...     monitors = ("val/loss",)
    ...     def fires(self, loss: float) -> bool:
    ...         return loss < 1.0
    >>> trigger = Below(warmup_steps=10)
    >>> trigger.observe(5, 0.9), trigger.observe(15, 0.9)
    (False, True)
    """

    warmup_steps: Steps = 0
    cooldown_steps: Steps = 0
    _deaf_until: int = field(default=0, init=False, repr=False)

    @property
    def monitors(self) -> tuple[str, ...]:
        """Names of the metrics that it is shown after each validation, in the order of its arguments."""
        return ()

    @property
    def reason(self) -> str:
        """What is written into a run's history when it fires."""
        return type(self).__name__

    @abstractmethod
    def fires(self, *seen: Any) -> bool:
        """Take one observation in; whether it is time to act.

        Args:
            *seen: the values of :attr:`monitors`.
        """

    def observe(self, step: int, *seen: Any) -> bool:
        """What :meth:`fires` says after optimizer step ``step``; False in the warm-up and the cooldown."""
        return step >= max(self.warmup_steps, self._deaf_until) and self.fires(*seen)

    def reset(self, step: int) -> None:
        """Forget the history, since a change of rank at ``step`` moves what is observed, and start the cooldown."""
        for part in self._state_fields():
            default = part.default if part.default_factory is MISSING else part.default_factory()
            setattr(self, part.name, default)
        self._deaf_until = step + self.cooldown_steps

    def state_dict(self) -> dict[str, Any]:
        """The state, of values that ``torch.load(weights_only=True)`` takes."""
        return {part.name: getattr(self, part.name) for part in self._state_fields()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that :meth:`state_dict` returned."""
        for part in self._state_fields():
            setattr(self, part.name, state[part.name])

    def _state_fields(self) -> list[Field[Any]]:
        return [part for part in fields(self) if not part.init]
