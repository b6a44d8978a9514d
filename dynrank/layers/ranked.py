"""The interface of a LoRA layer for resizing and schedules, and the functions that give it another rank."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from dynrank.errors import ConfigurationError
from dynrank.kernels.lora_linear import Observer


class RankedLayer(Protocol):
    """A LoRA layer whose rank can change: dynrank's own, or a view of another library's.

    Its update is ``scaling * lora_B @ lora_A``; lora_A is (rank, d_in), lora_B (d_out, rank). The factors of PEFT's
    convolutions are filters, which :meth:`products` and :meth:`set_factors` treat as matrices. A layer of experts has
    one product per expert, all of the same rank, and its factors stack them (:func:`dynrank.linalg.split`).
    """

    # Its rank at the end of a schedule; None for the schedule's own target.
    final_rank: int | None
    # The highest rank that a budget may give it; None for the budget's own bound.
    highest: int | None
    # Whether schedules leave its rank unchanged.
    pinned: bool

    @property
    def lora_A(self) -> nn.Parameter: ...

    @property
    def lora_B(self) -> nn.Parameter: ...

    @property
    def experts(self) -> int:
        """How many products the factors stack; 1 in a plain layer."""
        ...

    @property
    def rank(self) -> int: ...

    @property
    def scaling(self) -> float: ...

    @property
    def base(self) -> nn.Module:
        """The frozen layer."""
        ...

    @property
    def module(self) -> nn.Module:
        """The module whose input and output are those of the layer."""
        ...

    @property
    def merged(self) -> bool: ...

    def products(self) -> list[tuple[Tensor, Tensor]]:
        """(lora_B (d_out, rank), lora_A (rank, d_in)) of each product."""
        ...

    def set_factors(self, lora_A: Tensor, lora_B: Tensor) -> None: ...

    @property
    def observe(self) -> Callable[[Observer], Callable[[], None]] | None:
        """As :meth:`dynrank.layers.base.LoRALayer.observe`; None if the layer does not compute z = A x per example."""
        ...


def max_rank(layer: RankedLayer) -> int:
    """The highest possible rank of ``layer``, min(d_in, d_out)."""
    return min(len(layer.lora_B), layer.lora_A[0].numel())


def width_of(layer: RankedLayer) -> int:
    """(d_out + d_in) * experts: the parameters of one direction."""
    return (layer.lora_B.shape[0] + layer.lora_A[0].numel()) * layer.experts


@torch.no_grad()
def put_factors(layer: RankedLayer, lora_A: Tensor, lora_B: Tensor) -> None:
    """Put new factors, of any rank, into the same two Parameter objects of ``layer``, and delete their gradients."""
    for parameter, value in ((layer.lora_A, lora_A), (layer.lora_B, lora_B)):
        parameter.grad = None
        parameter.set_(value)  # type: ignore[call-overload]


def take_rank(
    layer: RankedLayer, name: str, lora_A: Tensor | None, lora_B: Tensor | None, *, most: int | None = None
) -> None:
    """Give the layer the rank of the factors that are about to be loaded.

    A factor that the state dict lacks is None; torch reports it later. ``most`` is the highest rank that is accepted;
    PEFT's layers may have any rank.
    """
    if layer.merged:
        raise RuntimeError(f"{name!r} is merged; call unmerge_adapter() before loading into it")
    if lora_A is None or lora_B is None:
        return
    d_out, d_in, rank = layer.lora_B.shape[0], layer.lora_A[0].numel(), lora_A.shape[0] // layer.experts
    rows = rank * layer.experts
    sizes = [(*factor.flatten(1).shape,) for factor in (lora_A, lora_B)]
    alike = lora_A.ndim == layer.lora_A.ndim and lora_B.ndim == layer.lora_B.ndim
    if sizes != [(rows, d_in), (d_out, rows)] or not alike or not 1 <= rank <= (most or rank):
        raise ConfigurationError(
            f"the checkpoint's factors of {name!r} are {[*lora_A.shape]} and {[*lora_B.shape]}, "
            f"no LoRA update of a ({d_out}, {d_in}) layer; load it into the model that it was saved from (ckpt_path)"
        )
    if rank != layer.rank:
        layer.set_factors(layer.lora_A.new_empty(rows, d_in), layer.lora_B.new_empty(d_out, rows))
