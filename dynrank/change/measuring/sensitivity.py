"""AdaLoRA's importance of the directions of an update (Zhang et al., arXiv:2303.10512, equations 8 to 11)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dynrank.change.measuring.collector import Collector
from dynrank.layers.ranked import RankedLayer
from dynrank.linalg import truncate_product

_BETA = 0.85  # both of AdaLoRA's smoothing factors, its default


class Sensitivity(Collector):
    """Smoothed sensitivity times uncertainty of every direction of ``layers``, from weights and gradients.

    AdaLoRA parametrises the update as P Lambda Q; here the directions are those of the balanced SVD of ``B @ A`` when
    collecting begins, in whose coordinates weights and gradients are read at every step.

    Args:
        layers: name -> layer. Call :meth:`end_step` after each optimizer step, before gradients are zeroed.
    """

    def __init__(self, layers: Mapping[str, RankedLayer]) -> None:
        super().__init__(layers)
        for name, layer in layers.items():
            change = truncate_product(layer.lora_B, layer.lora_A, layer.rank)
            self._tensors[name] = {"from_A": change.from_A, "from_B": change.from_B}

    @torch.no_grad()
    def end_step(self) -> None:
        """Take in the weights and gradients of the step just made, which all processes have alike already."""
        for name, layer in self._layers.items():
            if layer.lora_A.grad is None or layer.lora_B.grad is None:
                continue
            state = self._tensors[name]
            from_A, from_B = state["from_A"], state["from_B"]
            rows = (from_A @ layer.lora_A.double()) * (from_B.mT @ layer.lora_A.grad.double())
            columns = (layer.lora_B.double() @ from_B) * (layer.lora_B.grad.double() @ from_A.mT)
            # the gradient at a singular value, times the value, is the sum of w * g over its column
            for part, products in (("rows", rows), ("columns", columns), ("values", columns.sum(0))):
                now = products.abs()
                mean = state.get(f"{part}_mean", torch.zeros_like(now)).lerp(now, 1 - _BETA)
                spread = state.get(f"{part}_spread", torch.zeros_like(now)).lerp((now - mean).abs(), 1 - _BETA)
                state[f"{part}_mean"], state[f"{part}_spread"] = mean, spread

    def of(self, name: str) -> Tensor:
        """Importance of each direction, (rank,) float64; zero if no step was taken in."""
        state = self._tensors[name]
        if "rows_mean" not in state:
            return torch.zeros(len(state["from_A"]), dtype=torch.float64)
        rows, columns, values = (state[f"{p}_mean"] * state[f"{p}_spread"] for p in ("rows", "columns", "values"))
        return values + rows.mean(1) + columns.mean(0)
