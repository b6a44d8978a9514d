"""Who makes the rank-sized products of a LoRA layer: ATen, on any device, or Triton's kernels on a GPU."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from dynrank.errors import ConfigurationError
from dynrank.kernels import torch_backend, triton_launch

__all__ = ["BACKENDS", "check_backend", "products_of"]

BACKENDS = ("auto", "torch", "triton")


def check_backend(backend: str) -> str:
    """``backend``, if it is one.

    Raises:
        ConfigurationError: if it is not.
    """
    if backend not in BACKENDS:
        raise ConfigurationError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}; set lora.backend")
    return backend


def products_of(backend: str, x: Tensor, rank: int) -> ModuleType:
    """The module that makes the products: Triton's kernels where ``backend`` is ``triton``, else ATen.

    ``auto`` is ATen everywhere until the kernels have been measured on a GPU.

    Raises:
        ConfigurationError: if there is no such backend, or Triton's kernels cannot serve ``x`` at this rank.
    """
    if check_backend(backend) != "triton":
        return torch_backend
    fault = triton_launch.serves(x, rank)
    if fault is not None:
        raise ConfigurationError(f"{fault}; set lora.backend=torch, or auto")
    return triton_launch
