"""The last step of an optimizer, as the importance of layers needs it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dynrank.private import version_of


class LastStep:
    """Watches the steps of an optimizer, until :meth:`remove`.

    Args:
        optimizer: the optimizer to hook.
        adapters: the factors of all LoRA layers.

    Attributes:
        made: whether the optimizer has made a step since :meth:`forget`.
    """

    def __init__(self, optimizer: Optimizer, adapters: Collection[nn.Parameter]) -> None:
        self._optimizer = optimizer
        self._adapters = {id(parameter) for parameter in adapters}
        self._handle = optimizer.register_step_post_hook(self._after)
        self.forget()

    def forget(self) -> None:
        """Forget the last step."""
        self.made = False
        # A factor that had a gradient in the step, and the version of this gradient.
        self._witness: tuple[nn.Parameter, int] | None = None

    def remove(self) -> None:
        """Watch no longer."""
        self._handle.remove()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The optimizer's parameters."""
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    @property
    def had_gradients(self) -> bool:
        """Whether a factor had a gradient in the step."""
        return self._witness is not None

    @property
    def has_lost_gradients(self) -> bool:
        """Whether the factors had gradients in the step, and have none any more, or only zeros."""
        if self._witness is None:
            return False
        factor, version = self._witness
        if factor.grad is not None and version_of(factor.grad) == version:
            return False
        # Only here, because a look at the values waits for the GPU.
        return all(p.grad is None or not p.grad.any() for p in self.parameters if id(p) in self._adapters)

    def _after(self, *_: Any) -> None:
        self.made = True
        found = (p for p in self.parameters if id(p) in self._adapters and p.grad is not None)
        factor = next(found, None)
        if factor is not None and factor.grad is not None:
            self._witness = factor, version_of(factor.grad)
