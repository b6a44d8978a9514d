"""A hash of nested state, which tells whether two checkpoints, or the states of two processes, are equal."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def digest(value: Any) -> str:
    """A hash of nested containers, tensors (shape, dtype and bits) and plain values, 32 hexadecimal digits.

    For other objects only the type counts; for a sparse tensor only shape and dtype.
    """
    running = hashlib.blake2b(digest_size=16)
    _add(running, value)
    return running.hexdigest()


def _add(running: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        running.update(f"T{value.dtype}{tuple(value.shape)}".encode())
        if value.layout == torch.strided:
            flat = value.detach().cpu().contiguous().reshape(-1)
            running.update(flat.view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        running.update(f"M{len(value)}".encode())
        for key, member in value.items():
            _add(running, key)
            _add(running, member)
    elif isinstance(value, list | tuple):
        running.update(f"{type(value).__name__}{len(value)}".encode())
        for member in value:
            _add(running, member)
    elif value is None or isinstance(value, bool | int | float | complex | str | bytes):
        running.update(f"{type(value).__name__}{value!r};".encode())
    else:
        running.update(f"O{type(value).__qualname__};".encode())
