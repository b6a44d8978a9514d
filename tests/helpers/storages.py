"""The tensors that an object holds, found by its attributes and containers."""

import torch


def storages_of(value, leave_out=()):
    """{address: bytes} of the storages of all tensors in ``value``, without the attributes ``leave_out``."""
    if isinstance(value, torch.Tensor):
        return {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()}
    if isinstance(value, dict):
        value = [*value.values()]
    elif not isinstance(value, list | tuple):
        value = [part for name, part in getattr(value, "__dict__", {}).items() if name not in leave_out]
    return {address: size for part in value for address, size in storages_of(part, leave_out).items()}
