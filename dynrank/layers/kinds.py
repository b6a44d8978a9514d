"""One class of LoRA layer per kind of base layer: its shape, its forward, and its update in the weight's shape."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynrank.errors import ConfigurationError
from dynrank.kernels.backends import op_pays
from dynrank.kernels.lora_linear import Weight, add_update, lora_linear
from dynrank.layers.experts import BareParameter, LoRAExpertStack, LoRARouterWeight
from dynrank.layers.foreign import class_if_imported
from dynrank.layers.lora_layer import LoRALayer
from dynrank.layers.partitioned import whole_shape
from dynrank.layers.quantized import computes_in, is_quantized, unpacker
from dynrank.private import has_device_hook, is_recorded, need_own_call


class LoRALinear(LoRALayer):
    """``y = x W^T + b + scaling * (drop(x) A^T) B^T``; x is (..., d_in)."""

    supported = nn.Linear

    def _weight_OI(self) -> Weight:
        return self.weight

    def reference(self, x: Tensor) -> Tensor:
        """The output by an operation of torch for each part of the formula.

        The fused op in :meth:`forward` computes the same, draws another mask of dropout, and saves fewer bytes for
        the backward. This formula runs for inputs so small that it takes less time (on a CPU); under
        ``torch.compile``, which can fuse plain operations; under ``torch.func``, ``torch.jit.trace`` and forward-mode
        AD, which do not support the op; if the base has hooks or a forward of its own, which only its call runs; and
        if its weight or bias is trained, whose gradients the op does not compute.
        """
        lora_A: Tensor = self.lora_A
        lora_B: Tensor = self.lora_B
        y: Tensor = self.base(x)
        if not lora_A.dtype == lora_B.dtype == x.dtype:
            # As in the op: on a CPU, factors that are wider than x are multiplied in their own dtype.
            dtype = torch.promote_types(x.dtype, lora_A.dtype) if x.device.type == "cpu" else x.dtype
            x = x.to(dtype)
            lora_A = lora_A.to(dtype)
            lora_B = lora_B.to(dtype)
        x = self.dropout(x) if self._drops() else x
        return add_update(y, F.linear(F.linear(x, lora_A), lora_B), self.scaling)

    def _drops(self) -> bool:
        dropout = self.dropout
        return dropout.training and dropout.p > 0

    def _needs_own_call(self) -> bool:
        """Whether only the base's own call does all that is wanted of it."""
        return need_own_call(self.base) or bool(self.trained_in_base())

    def _op_pays(self, x: Tensor) -> bool:
        return op_pays(x, self.lora_B.shape[0], self.weight.dtype, self._drops())

    def forward(self, x: Tensor) -> Tensor:
        if is_recorded() or self.backend == "reference" or (self.backend == "auto" and not self._op_pays(x)):
            return self.reference(x)
        if self._needs_own_call():
            return self.reference(x)
        return lora_linear(
            x,
            self._weight_OI(),
            self.bias,
            self.lora_A,
            self.lora_B,
            self.scaling,
            self.dropout.p if self._drops() else 0.0,
            backend=self.backend,
        )


class LoRAConv1D(LoRALinear):
    """LoRALinear for transformers' Conv1D (GPT-2), which stores its weight as (d_in, d_out)."""

    @classmethod
    def shape_of(cls, base: nn.Module) -> tuple[int, int]:
        d_in, d_out = whole_shape(base.get_parameter("weight"))
        return d_out, d_in

    def _weight_OI(self) -> Tensor:
        return self.weight.mT

    def _in_weight_shape(self, delta_OI: Tensor) -> Tensor:
        return delta_OI.mT.contiguous()


class LoRAQuantizedLinear(LoRALinear):
    """LoRALinear for a weight that a library has packed (QLoRA, arXiv:2305.14314); the weight stays packed."""

    @classmethod
    def shape_of(cls, base: nn.Module) -> tuple[int, int]:
        # The packed weight has another shape.
        linear: Any = base
        return linear.out_features, linear.in_features

    def _weight_OI(self) -> Callable[[], Tensor]:
        unpack = unpacker(self.base)
        # forward has checked that the weight can be unpacked.
        assert unpack is not None
        return unpack

    def _op_pays(self, x: Tensor) -> bool:
        # In bytes: by plain operations torch keeps an unpacked weight for the backward.
        return True

    def forward(self, x: Tensor) -> Tensor:
        # In inference the library's own forward multiplies by the packed weight without unpacking it.
        if torch.is_grad_enabled() and unpacker(self.base) is not None:
            return super().forward(x.to(computes_in(self.base, x))).to(x.dtype)
        return self.reference(x)


class LoRAEmbedding(LoRALayer):
    """``y = W[ids] + scaling * A^T[ids] B^T``; lora_A is (rank, num_embeddings), lora_B (embedding_dim, rank)."""

    supported = nn.Embedding
    base: nn.Embedding

    @classmethod
    def shape_of(cls, base: nn.Module) -> tuple[int, int]:
        if getattr(base, "max_norm", None) is not None:
            raise ConfigurationError(
                "LoRA on Embedding needs max_norm=None; leave it out of target_modules", "target_modules"
            )
        num_embeddings, dim = whole_shape(base.get_parameter("weight"))
        return dim, num_embeddings

    def init_A(self) -> None:
        """Draw lora_A from a standard normal: an embedding picks single columns of A, so fan-in does not matter."""
        nn.init.normal_(self.lora_A)

    def _in_weight_shape(self, delta_OI: Tensor) -> Tensor:
        return delta_OI.mT.contiguous()

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.base(ids)
        by_count = self.base.scale_grad_by_freq
        rows = F.embedding(ids, self.lora_A.mT, padding_idx=self.base.padding_idx, scale_grad_by_freq=by_count)
        rows = self.dropout(rows)
        update: Tensor = self.scaling * (rows @ self.lora_B.mT)
        return y + update.to(y.dtype)


class LoRAConv2d(LoRALayer):
    """A convolution by A (``rank`` filters with the base's kernel size), then a 1x1 convolution by B.

    lora_A is (rank, in_channels * kernel height * kernel width), lora_B (out_channels, rank).
    """

    supported = nn.Conv2d
    base: nn.Conv2d

    @classmethod
    def shape_of(cls, base: nn.Module) -> tuple[int, int]:
        # PEFT's format can express only these settings of a Conv2d.
        plain = {"groups": 1, "dilation": (1, 1), "padding_mode": "zeros"}
        for name, value in plain.items():
            if getattr(base, name) != value:
                raise ConfigurationError(
                    f"LoRA on Conv2d needs {name}={value}, got {getattr(base, name)}; leave it out of target_modules",
                    "target_modules",
                )
        weight = base.get_parameter("weight")
        return weight.shape[0], weight[0].numel()

    def _in_weight_shape(self, delta_OI: Tensor) -> Tensor:
        return delta_OI.view_as(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        filters = self.lora_A.view(self.rank, *self.weight.shape[1:]).to(x.dtype)
        down = F.conv2d(self.dropout(x), filters, stride=self.base.stride, padding=self.base.padding)
        return y + self.scaling * F.conv2d(down, self.lora_B.view(-1, self.rank, 1, 1).to(down.dtype))


# LoRAConv1D is not one of them, because its class is in transformers, which need not be imported.
LAYERS: tuple[type[LoRALayer], ...] = (
    LoRALinear,
    LoRAEmbedding,
    LoRAConv2d,
    LoRAExpertStack,
    LoRARouterWeight,
)


OFFLOADED = "accelerate keeps its weight elsewhere between calls (device_map); load the model whole into one memory"


def is_offloaded(base: nn.Module) -> bool:
    """Whether accelerate brings the weight of ``base`` for each call alone, from another memory or a disk."""
    called = base.owner if isinstance(base, BareParameter) else base
    weight = getattr(base, "weight", None)
    return has_device_hook(called) and isinstance(weight, Tensor) and weight.is_meta


def layer_class(base: nn.Module) -> type[LoRALayer] | None:
    """The class of LoRA layer for ``base``; None for a module that cannot have LoRA.

    A subclass with its own forward (scaled, quantised by another library, ...) cannot have LoRA, except Falcon's, which
    computes the same as a plain linear layer. Nor can a layer that computes its weight (weight norm, pruning).
    """
    own = dict(base.named_parameters(recurse=False, remove_duplicate=False))
    if "weight" not in own and not isinstance(base, BareParameter):
        return None
    if is_quantized(base):
        return LoRAQuantizedLinear
    conv1d = class_if_imported("transformers.pytorch_utils.Conv1D")
    if isinstance(base, conv1d):
        return LoRAConv1D if type(base).forward is conv1d.forward else None
    for cls in LAYERS:
        if isinstance(base, cls.supported):
            is_plain = type(base).forward is cls.supported.forward or type(base).__name__ == "FalconLinear"
            return cls if is_plain else None
    return None
