"""The gradient of a whole update, sketched: where a growing layer would learn fastest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dynrank.change.measuring.collector import Collector
from dynrank.errors import ConfigurationError
from dynrank.layers.ranked import RankedLayer

_OVERSAMPLING = 8  # of a randomised range finder (Halko, Martinsson and Tropp, arXiv:0909.4061, section 4.2)


class GradientSketch(Collector):
    """``Omega^T G`` of each layer: G is the loss's gradient at W (d_out, d_in), summed over steps, and Omega random.

    LoRA never forms G; its own gradients show only what of G lies in col(B) and row(A). The sketch costs two products
    with ``count + 8`` columns in each backward pass. All steps weigh the same.

    Args:
        layers: name -> layer; linear ones.
        count: how many directions will be asked for.
        seed: of Omega, so that a resumed run and every process draw the same.

    Raises:
        ConfigurationError: if a layer's input is not a matrix of features (an embedding, a convolution).
    """

    def __init__(self, layers: Mapping[str, RankedLayer], count: int, seed: int) -> None:
        super().__init__(layers)
        generator = torch.Generator().manual_seed(seed)
        for name, layer in layers.items():
            if isinstance(layer.base, nn.Embedding | nn.Conv2d):
                raise ConfigurationError(
                    f"{name!r} adapts a {type(layer.base).__name__}; growing along the gradient is for linear layers: "
                    "set schedule.new_rows=orthogonal"
                )
            omega = torch.randn(layer.lora_B.shape[0], count + _OVERSAMPLING, generator=generator)
            omega = omega.to(layer.lora_A.device)
            sketch = torch.zeros(omega.shape[1], layer.lora_A.shape[1], dtype=torch.float64, device=omega.device)
            self._tensors[name] = {"sketch": sketch}
            self._stops.append(layer.module.register_forward_hook(self._watch(name, omega)).remove)

    def _watch(self, name: str, omega_OP: Tensor) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                x = inputs[0].detach()

                def add(dy: Tensor) -> None:
                    dy_MO = dy.reshape(-1, dy.shape[-1]).float()
                    self.of(name).add_((dy_MO @ omega_OP).mT @ x.reshape(-1, x.shape[-1]).float())

                output.register_hook(add)  # type: ignore[no-untyped-call]

        return hook

    def of(self, name: str) -> Tensor:
        """The sketch, (count + 8, d_in) float64."""
        return self._tensors[name]["sketch"]
