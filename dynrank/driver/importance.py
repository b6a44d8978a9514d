"""What each layer has importance: the part of the loss's decrease that its updates have caused (loss change allocation).

``L = -sum_t g_{t+1} . (theta_{t+1} - theta_t)`` over the optimizer steps (Lan et al., arXiv:1909.01440). The gradient
is that of the next step, so an update is not judged by the noise of its own batch. The terms come from the factors and
gradients that every optimizer step has anyway, whatever the optimizer, the layer or the way it is trained.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynrank.layers.base import RankedLayer


class LayerImportance(NamedTuple):
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


class Importance:
    """Sums the decrease of the loss by layer; all sums are float64 on the device of the first layer.

    Args:
        layers: name -> layer, at the start of the run or as in the checkpoint.
    """

    def __init__(self, layers: Mapping[str, RankedLayer]) -> None:
        self._layers = dict(layers)
        device = next((layer.lora_A.device for layer in layers.values()), None)
        self._sums = torch.zeros(len(layers), dtype=torch.float64, device=device)
        self._squares = torch.zeros_like(self._sums)
        # By layer, because optimizers may step in turn.
        self._steps = torch.zeros(len(layers), dtype=torch.float64, device=device)
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
        # None before the first step of the factor's optimizer.
        self._updates: list[Tensor | None] = [None] * len(self._before)

    @torch.no_grad()
    def end_step(self, stepped: Collection[int] | None = None) -> None:
        """Take the gradients of the optimizer step just made and the update before it; nothing waits for a GPU.

        Args:
            stepped: ids of the parameters of the optimizers that have made it; None: all.
        """
        factors = self._factors
        # Somebody else has changed ranks.
        if any(now.shape != before.shape for now, before in zip(factors, self._before, strict=True)):
            self.restart()
            return
        # Gradients of another optimizer's factors may be old ones, from which their last update was made.
        grads = [factor.grad if stepped is None or id(factor) in stepped else None for factor in factors]
        device = self._sums.device
        products = [
            None if grad is None or update is None else (grad * update).sum(dtype=torch.float64).to(device)
            for grad, update in zip(grads, self._updates, strict=True)
        ]
        if any(product is not None for product in products):
            zero = self._sums.new_zeros(())
            terms = -torch.stack([zero if product is None else product for product in products]).view(-1, 2).sum(1)
            # Gradients that are not finite, as those of a step that GradScaler has skipped, say nothing.
            is_known = terms.isfinite().all()
            terms = torch.where(is_known, terms, 0.0)
            self._sums += terms
            self._squares += terms.square()
            pairs = zip(products[::2], products[1::2], strict=True)
            self._steps += torch.stack([zero if a is None and b is None else is_known.double() for a, b in pairs])
        # An update waits for the next gradient of its factor.
        self._updates = [
            update if grad is None else now.detach().to(torch.promote_types(now.dtype, torch.float32)) - before
            for update, grad, now, before in zip(self._updates, grads, factors, self._before, strict=True)
        ]
        for now, before in zip(factors, self._before, strict=True):
            before.copy_(now)

    def of_layers(self) -> dict[str, LayerImportance]:
        """{layer: its part of the decrease}; empty before the second step."""
        steps = self._steps.tolist()
        if not any(steps):
            return {}
        found = {}
        sums = self._sums.tolist()
        squares = self._squares.tolist()
        for name, value, square, count in zip(self._layers, sums, squares, steps, strict=True):
            # The standard deviation of a step's term, times the root of the number of steps.
            spread = max(square - value**2 / max(count, 1.0), 0.0)
            found[name] = LayerImportance(value, sqrt(spread * count / (count - 1)) if count > 1 else 0.0)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors; the updates are copied, because the next step replaces them."""
        return {
            "sums": self._sums.clone(),
            "squares": self._squares.clone(),
            "steps": self._steps.clone(),
            "updates": [None if update is None else update.clone() for update in self._updates],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``; the layers hold the factors of the same checkpoint."""
        self._sums.copy_(state["sums"])
        self._squares.copy_(state["squares"])
        self._steps.copy_(state["steps"])
        # A layer's device may differ from the one in the run before.
        pairs = zip(state["updates"], self._factors, strict=True)
        self._updates = [None if update is None else update.to(factor.device) for update, factor in pairs]
