"""The tensors of a model, and their bytes."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from dynrank.layers.quantized import is_quantized


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Every parameter and buffer, and the scales and tables of weights that bitsandbytes has packed."""
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


def storage_key(tensor: Tensor) -> int:
    """A number that is the same for all tensors with the same storage, while one of them exists."""
    key: int = tensor.untyped_storage()._cdata
    return key


def storage_bytes(tensors: Iterable[Tensor | None]) -> int:
    """The bytes of the storages of ``tensors``; a shared storage counts once."""
    held = [tensor for tensor in tensors if tensor is not None]
    return sum({storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in held}.values())
