"""What each layer has brought: the part of the loss's decrease that its updates have caused (loss change allocation).

``L = -sum_t g_{t+1} . (theta_{t+1} - theta_t)`` over the optimizer steps (Lan et al., arXiv:1909.01440). The gradient
is that of the next step, so an update is not judged by the noise of its own batch. The terms come from the factors and
gradients that every optimizer step has anyway, whatever the optimizer, the layer or the way it is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynrank.layers.base import RankedLayer


class Contribution(NamedTuple):
    """A part of the loss's decrease.

    Attributes:
        value: the decrease; negative if the updates have raised the loss.
        error: its standard error over the steps.
    """

    value: float
    error: float

    @property
    def worth(self) -> float:
        """What ranks are in proportion to; the error leaves a chance to a layer that the noise may have hidden."""
        return max(self.value, 0.0) + self.error


class Brought:
    """Sums the decrease of the loss by layer and by factor; all sums are float64 on the device of the first layer.

    Args:
        layers: name -> layer, at the start of the run or as in the checkpoint.
    """

    def __init__(self, layers: Mapping[str, RankedLayer]) -> None:
        self._layers = dict(layers)
        device = next((layer.lora_A.device for layer in layers.values()), None)
        # For lora_A, lora_B and both together: (3, layers).
        self._sums = torch.zeros(3, len(layers), dtype=torch.float64, device=device)
        self._squares = torch.zeros_like(self._sums)
        self._steps = torch.zeros((), dtype=torch.float64, device=device)
        self.restart()

    @property
    def _factors(self) -> list[nn.Parameter]:
        return [factor for la in self._layers.values() for factor in (la.lora_A, la.lora_B)]

    def is_of(self, layers: Mapping[str, RankedLayer]) -> bool:
        """Whether these are the layers that are measured."""
        factors = [factor for la in layers.values() for factor in (la.lora_A, la.lora_B)]
        return [*self._layers] == [*layers] and all(a is b for a, b in zip(factors, self._factors, strict=True))

    def restart(self) -> None:
        """Forget the last update; call it after a change of the factors that was not an optimizer step."""
        self._before = [factor.detach().clone() for factor in self._factors]
        self._updates: list[Tensor] = []

    @torch.no_grad()
    def end_step(self) -> None:
        """Take the gradients of the optimizer step just made and the update before it; nothing waits for a GPU."""
        factors = self._factors
        # Somebody else has changed ranks.
        if any(now.shape != before.shape for now, before in zip(factors, self._before, strict=True)):
            self.restart()
            return
        if self._updates:
            device = self._sums.device
            zero = self._sums.new_zeros(())
            products = [
                zero if factor.grad is None else (factor.grad * update).sum(dtype=torch.float64).to(device)
                for factor, update in zip(factors, self._updates, strict=True)
            ]
            terms = -torch.stack(products).view(-1, 2).mT
            terms = torch.cat([terms, terms.sum(0, keepdim=True)])
            # Gradients that are not finite, as those of a step that GradScaler has skipped, say nothing.
            is_known = terms.isfinite().all()
            terms = torch.where(is_known, terms, 0.0)
            self._sums += terms
            self._squares += terms.square()
            self._steps += is_known
        self._updates = [
            now.detach().to(torch.promote_types(now.dtype, torch.float32)) - before
            for now, before in zip(factors, self._before, strict=True)
        ]
        for now, before in zip(factors, self._before, strict=True):
            before.copy_(now)

    def contributions(self, factor: str = "both") -> dict[str, Contribution]:
        """{layer: its part of the decrease}, of ``lora_A``, ``lora_B`` or both; empty before the second step."""
        steps = int(self._steps)
        if steps == 0:
            return {}
        row = ("lora_A", "lora_B", "both").index(factor)
        found = {}
        for name, value, square in zip(
            self._layers, self._sums[row].tolist(), self._squares[row].tolist(), strict=True
        ):
            # The standard deviation of a step's term, times the root of the number of steps.
            spread = max(square - value**2 / steps, 0.0)
            found[name] = Contribution(value, sqrt(spread * steps / (steps - 1)) if steps > 1 else 0.0)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors; the updates are copied, because the next step replaces them."""
        return {
            "sums": self._sums.clone(),
            "squares": self._squares.clone(),
            "steps": self._steps.clone(),
            "updates": [update.clone() for update in self._updates],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``; the layers hold the factors of the same checkpoint."""
        self._sums.copy_(state["sums"])
        self._squares.copy_(state["squares"])
        self._steps.copy_(state["steps"])
        # A layer's device may differ from the one in the run before.
        pairs = zip(state["updates"], self._factors, strict=False)
        self._updates = [update.to(factor.device) for update, factor in pairs]
