"""The tensors that a model holds, and the bytes that they take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from dynrank.layers.quantized import is_quantized

__all__ = ["storage_bytes", "tensors_of"]


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Every parameter and buffer, and what bitsandbytes keeps beside a packed weight; some more than once."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            yield from (tensor for tensor in tensors.values() if tensor is not None)
        if is_quantized(module):
            weight: Any = module.weight
            state = getattr(weight, "quant_state", None)
            kept = [getattr(weight, "CB", None), getattr(weight, "SCB", None)]
            for level in (state, getattr(state, "state2", None)):
                kept += [getattr(level, name, None) for name in ("absmax", "code", "offset")]
            yield from (tensor for tensor in kept if tensor is not None)


def storage_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the storages that hold ``tensors``, each storage once."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
