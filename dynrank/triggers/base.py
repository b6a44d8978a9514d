"""The base class of triggers that observe training: warm-up, and state that a change of rank resets."""

from abc import ABC, abstractmethod
from dataclasses import MISSING, Field, fields
from typing import Any

from dynrank.errors import Steps, checked


@checked(frozen=False, kw_only=True)
class Trigger(ABC):
    """A small state machine that says when ranks should change. Subclasses write :meth:`fires` and ``monitors``.

    Fields that the constructor takes are the arguments. Fields with ``init=False`` are the state: plain values and
    tensors, which return to their defaults after a change.

    Args:
        warmup_steps: the trigger observes nothing before this optimizer step.

    >>> class Below(Trigger):
    ...     monitors = ("val/loss",)
    ...     def fires(self, loss: float) -> bool:
    ...         return loss < 1.0
    >>> trigger = Below(warmup_steps=10)
    >>> trigger.observe(5, 0.9), trigger.observe(15, 0.9)
    (False, True)
    """

    warmup_steps: Steps = 0

    @property
    def monitors(self) -> tuple[str, ...]:
        """Names of the metrics that :meth:`fires` gets after each validation, in the order of its arguments."""
        return ()

    @property
    def reason(self) -> str:
        """The text that a run's history shows when the trigger fires."""
        return type(self).__name__

    @abstractmethod
    def fires(self, *values: Any) -> bool:
        """Record one observation, the values of :attr:`monitors`, and say whether ranks should change now."""

    def observe(self, step: int, *values: Any) -> bool:
        """The result of :meth:`fires` after optimizer step ``step``; False in the warm-up."""
        return step >= self.warmup_steps and self.fires(*values)

    def reset(self) -> None:
        """Reset the state after a change of rank."""
        for part in self._state_fields():
            default = part.default if part.default_factory is MISSING else part.default_factory()
            setattr(self, part.name, default)

    def state_dict(self) -> dict[str, Any]:
        """The state, in values that ``torch.load(weights_only=True)`` can load."""
        return {part.name: getattr(self, part.name) for part in self._state_fields()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that :meth:`state_dict` returned."""
        for part in self._state_fields():
            setattr(self, part.name, state[part.name])

    def _state_fields(self) -> list[Field[Any]]:
        return [part for part in fields(self) if not part.init]
