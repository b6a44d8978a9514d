"""A view of one adapter of a PEFT LoRA layer, with the interface of a layer whose rank can change."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dynrank.layers.base import put_factors
from dynrank.linalg import products


class PeftLayer:
    """One adapter of a PEFT LoRA layer as a :class:`dynrank.layers.base.RankedLayer`.

    ``module`` is a peft.tuners.lora.LoraLayer, ``adapter`` the name of one of its adapters. All data is stored on the
    module, so two views of one adapter are equivalent.
    """

    # So that nobody sets an attribute on a view, which is made anew each time.
    __slots__ = ("adapter", "module")

    # A rank map, which gives single layers bounds of their own, belongs to add_lora.
    final_rank: int | None = None
    highest: int | None = None
    pinned = False

    def __init__(self, module: Any, adapter: str) -> None:
        self.module = module
        self.adapter = adapter

    @property
    def lora_A(self) -> nn.Parameter:
        """(rank, d_in); (rank, channels, kernel...) for a convolution."""
        return self._factor("A")

    @property
    def lora_B(self) -> nn.Parameter:
        """(d_out, rank); (d_out, rank, 1...) for a convolution."""
        return self._factor("B")

    def _factor(self, which: str) -> nn.Parameter:
        if self.of_embedding:
            factor: nn.Parameter = getattr(self.module, f"lora_embedding_{which}")[self.adapter]
        else:
            factor = getattr(self.module, f"lora_{which}")[self.adapter].weight
        return factor

    @property
    def of_embedding(self) -> bool:
        """Whether the base is an embedding, for which PEFT stores the factors as bare Parameters."""
        return self.adapter in self.module.lora_embedding_A

    @property
    def of_parameter(self) -> bool:
        """Whether PEFT adapts a bare parameter (target_parameters): it adds the update to it in every forward."""
        return hasattr(self.module, "parameter_name")

    @property
    def num_products(self) -> int:
        return self.module.num_experts if self.of_parameter else 1

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0] // self.num_products

    def products(self) -> list[tuple[Tensor, Tensor]]:
        """As :meth:`dynrank.layers.base.LoRALayer.products`."""
        return products(self.lora_B, self.lora_A, self.num_products)

    @property
    def scaling(self) -> float:
        return float(self.module.scaling[self.adapter])

    @property
    def alpha(self) -> float:
        return self.scaling * self.rank

    @property
    def base(self) -> nn.Module:
        base: nn.Module = self.module.get_base_layer()
        return base

    @property
    def merged(self) -> bool:
        return bool(self.module.merged)

    def set_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """As :meth:`dynrank.layers.base.LoRALayer.set_factors`; also updates the rank that PEFT's module records.

        :func:`dynrank.layers.peft_layers.config_changes` updates PEFT's config, once for all layers.
        """
        of_A = self.lora_A.shape[1:]
        of_B = self.lora_B.shape[2:]
        put_factors(self, lora_A.reshape(-1, *of_A), lora_B.reshape(len(lora_B), -1, *of_B))
        if not self.of_embedding:
            kind = "channels" if of_B else "features"
            rows = len(self.lora_A)
            setattr(self.module.lora_A[self.adapter], f"out_{kind}", rows)
            setattr(self.module.lora_B[self.adapter], f"in_{kind}", rows)
        self.module.r[self.adapter] = self.rank
        self.record_alpha()

    def record_alpha(self) -> None:
        """Record alpha so that PEFT's rule alpha / rank gives the scaling that the layer has."""
        self.module.lora_alpha[self.adapter] = self.alpha
        self.module.use_rslora[self.adapter] = False
