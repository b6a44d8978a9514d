"""Who makes the rank-sized products of a LoRA layer: ATen, on any device, or Triton's kernels on a GPU."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from dynrank.errors import ConfigurationError
from dynrank.kernels import torch_backend, triton_backend, triton_launch

__all__ = ["BACKENDS", "chosen_backend", "check_backend", "products_of"]

BACKENDS = ("auto", "torch", "triton")
AUTO_FROM = 4 * 2**20  # elements of x; below, starting a kernel may cost more than it saves (an estimate, not measured)


def check_backend(backend: str) -> str:
    """``backend``, if it is one.

    Raises:
        ConfigurationError: if it is not.
    """
    if backend not in BACKENDS:
        raise ConfigurationError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}; set lora.backend")
    return backend


def chosen_backend(backend: str, x: Tensor, rank: int, p: float) -> str:
    """``torch`` or ``triton``.

    ``auto`` is Triton where its kernels serve x at this rank (on a GPU) and have something to save: dropout's mask, or
    passes over an x of 4 M elements or more; elsewhere torch. The other two are what they say.

    Raises:
        ConfigurationError: if it is none of the three, or Triton is asked for what its kernels cannot serve.
    """
    if check_backend(backend) == "torch" or (backend == "auto" and x.device.type != "cuda"):
        return "torch"
    fault = triton_launch.serves(x, rank)
    if backend == "auto":
        return "triton" if fault is None and (p > 0 or x.numel() >= AUTO_FROM) else "torch"
    if fault is not None:
        raise ConfigurationError(f"{fault}; set lora.backend=torch, or auto")
    return "triton"


def products_of(backend: str) -> ModuleType:
    """The module with ``down``, ``up`` and their gradients of a backend that :func:`chosen_backend` has chosen."""
    return {"torch": torch_backend, "triton": triton_backend}[backend]
