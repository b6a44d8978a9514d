"""One LoRA layer per kind of base layer: its shape, its forward, and where its update lies in the base's weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dynrank.errors import ConfigurationError
from dynrank.kernels.dropout import draw_seed
from dynrank.kernels.lora_linear import lora_linear
from dynrank.kernels.packed_lora_linear import packed_lora_linear
from dynrank.layers.base import LoRALayer
from dynrank.layers.grouping import Group, shared_output
from dynrank.layers.quantized import computes_in, is_quantized, unpacked, unpacker


class LoRALinear(LoRALayer):
    """``y = x W^T + b + scaling * (x A^T) B^T``; x is (..., d_in)."""

    supported = nn.Linear
    _group: Group | None = None  # the layers that it may share a pass over x with

    @classmethod
    def shape_of(cls, base: nn.Module) -> tuple[int, int]:
        d_out, d_in = base.get_parameter("weight").shape
        return d_out, d_in

    def _weight_OI(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            y: Tensor = self.base(x)
            return y
        shared = shared_output(self, x)
        if shared is not None:
            return shared
        return self._fused(lora_linear, x, self._weight_OI())

    def _fused(self, op: Callable[..., Tensor], x: Tensor, weight: Any) -> Tensor:
        p = self.dropout.p if self.training else 0.0
        seed = draw_seed(x.device) if p else None
        factors = self.lora_A, self.lora_B
        return op(x, weight, self.bias, *factors, self.scaling, p, seed, backend=self.backend, tap=self._tap)


class LoRAConv1D(LoRALinear):
    """LoRALinear for transformers' Conv1D (GPT-2), which stores its weight as (d_in, d_out)."""

    supported = Conv1D

    @classmethod
    def shape_of(cls, base: nn.Module) -> tuple[int, int]:
        d_in, d_out = base.get_parameter("weight").shape
        return d_out, d_in

    def _weight_OI(self) -> Tensor:
        return self.weight.mT

    def _in_weight_shape(self, delta_OI: Tensor) -> Tensor:
        return delta_OI.mT.contiguous()


class LoRAQuantizedLinear(LoRALinear):
    """LoRALinear for a weight that a library has packed (QLoRA, arXiv:2305.14314); it stays packed, and as it is."""

    @classmethod
    def shape_of(cls, base: nn.Module) -> tuple[int, int]:
        d_out, d_in = base.out_features, base.in_features  # the packed weight has another shape
        assert isinstance(d_out, int)
        assert isinstance(d_in, int)
        return d_out, d_in

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            y: Tensor = self.base(x)
            return y
        unpack = unpacker(self.base) if torch.is_grad_enabled() else None
        if unpack is None:  # in inference the libraries multiply by the packed weight, without unpacking it
            y = self.base(x)
            down = self._watched(F.linear(self.dropout(x), self.lora_A.to(x.dtype)))
            return y + self.scaling * F.linear(down, self.lora_B.to(down.dtype))
        return self._fused(packed_lora_linear, x.to(computes_in(self.base, x)), unpack).to(x.dtype)

    def _in_weight_shape(self, delta_OI: Tensor) -> Tensor:
        return delta_OI

    def merge(self) -> None:
        """Put a plain layer, unpacked and with the update, in the place of the base.

        Raises:
            RuntimeError: if already merged.
            ConfigurationError: if the base is in 8 bits, see :func:`dynrank.layers.quantized.unpacked`.
        """
        if self.merged:
            raise RuntimeError("the layer is already merged; call unmerge() first")
        packed, self.base = self.base, unpacked(self.base)
        super().merge()
        self._unmerged = [packed.weight, packed]

    def unmerge(self) -> None:
        """Put the packed base back.

        Raises:
            RuntimeError: if not merged.
        """
        if not self.merged:
            raise RuntimeError("the layer is not merged; call merge() first")
        self.base = self._unmerged[1]
        self._unmerged = []


class LoRAEmbedding(LoRALayer):
    """``y = W[ids] + scaling * A^T[ids] B^T``; lora_A is (rank, num_embeddings), lora_B (embedding_dim, rank)."""

    supported = nn.Embedding
    base: nn.Embedding

    @classmethod
    def shape_of(cls, base: nn.Module) -> tuple[int, int]:
        if getattr(base, "max_norm", None) is not None:
            raise ConfigurationError("LoRA on Embedding needs max_norm=None; set lora.target_modules")
        num_embeddings, dim = base.get_parameter("weight").shape
        return dim, num_embeddings

    def init_A(self) -> None:
        """Standard normal: an embedding picks single columns of A, so fan-in is no measure of their size."""
        nn.init.normal_(self.lora_A)

    def _in_weight_shape(self, delta_OI: Tensor) -> Tensor:
        return delta_OI.mT.contiguous()

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.base(ids)
        if self.merged:
            return y
        rows = F.embedding(ids, self.lora_A.mT, padding_idx=self.base.padding_idx)
        rows = self._watched(self.dropout(rows))
        update: Tensor = self.scaling * (rows @ self.lora_B.mT)
        return y + update.to(y.dtype)


class LoRAConv2d(LoRALayer):
    """A convolution by A (rank filters of the base's geometry), then a 1x1 convolution by B.

    lora_A is (rank, in_channels * kernel height * kernel width), lora_B (out_channels, rank).
    """

    supported = nn.Conv2d
    base: nn.Conv2d

    @classmethod
    def shape_of(cls, base: nn.Module) -> tuple[int, int]:
        plain = {"groups": 1, "dilation": (1, 1), "padding_mode": "zeros"}  # what PEFT's format can say of a Conv2d
        for name, value in plain.items():
            if getattr(base, name) != value:
                raise ConfigurationError(
                    f"LoRA on Conv2d needs {name}={value}, got {getattr(base, name)}; set lora.target_modules"
                )
        weight = base.get_parameter("weight")
        return weight.shape[0], weight[0].numel()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self.merged:
            return y
        filters = self.lora_A.view(self.rank, *self.weight.shape[1:]).to(x.dtype)
        down = F.conv2d(self.dropout(x), filters, stride=self.base.stride, padding=self.base.padding)
        down = self._watched(down, channels=1)
        return y + self.scaling * F.conv2d(down, self.lora_B.view(-1, self.rank, 1, 1).to(down.dtype))


LAYERS: tuple[type[LoRALayer], ...] = (LoRALinear, LoRAConv1D, LoRAEmbedding, LoRAConv2d)


def layer_class(base: nn.Module) -> type[LoRALayer] | None:
    """The LoRA layer for ``base``; None for a module that cannot have one.

    A subclass with a forward of its own (scaled, quantised by another library, ...) computes something else than its
    parent and has none.
    """
    if is_quantized(base):
        return LoRAQuantizedLinear
    for cls in LAYERS:
        if isinstance(base, cls.supported) and type(base).forward is cls.supported.forward:
            return cls
    return None
