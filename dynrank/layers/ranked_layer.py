"""What every LoRA layer is whose rank can change, dynrank's own or PEFT's: its factors, and how they get a rank."""

from typing import Protocol

import torch
from torch import Tensor, nn

from dynrank.errors import ConfigurationError
from dynrank.linalg import OfShape, products
from dynrank.rank_map import RankBounds


class RankedLayer(Protocol):
    """A LoRA layer whose rank can change: dynrank's own, or a view of another library's.

    Its update is ``scaling * lora_B @ lora_A``; lora_A is (rank, d_in), lora_B (d_out, rank). The factors of PEFT's
    convolutions are filters, which :meth:`products` and :meth:`set_factors` treat as matrices. A layer of experts has
    one product per expert, all of the same rank, and its factors stack them (:func:`dynrank.linalg.split`).
    """

    # What its rank may become by the rank map of add_lora; the rank map of a schedule goes before it.
    bounds: RankBounds

    @property
    def bound(self) -> str:
        """What ``max_rank`` is, in words."""
        ...

    @property
    def lora_A(self) -> nn.Parameter: ...

    @property
    def lora_B(self) -> nn.Parameter: ...

    @property
    def num_products(self) -> int:
        """How many products the factors stack; 1 in a plain layer."""
        ...

    @property
    def d_out(self) -> int: ...

    @property
    def d_in(self) -> int:
        """Columns of the update; of a convolution, channels times the size of the kernel."""
        ...

    @property
    def max_rank(self) -> int:
        """The highest possible rank, min(d_in, d_out)."""
        ...

    @property
    def params_per_rank(self) -> int:
        """(d_out + d_in) * num_products: the parameters of one direction."""
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


class _Stacked(Protocol):
    """What :class:`OfFactors` reads and fills."""

    @property
    def lora_A(self) -> nn.Parameter: ...

    @property
    def lora_B(self) -> nn.Parameter: ...

    @property
    def num_products(self) -> int: ...


class OfFactors(OfShape):
    """What the factors of a layer say about it, and how they change; a base of every class of layers."""

    __slots__ = ()

    @property
    def d_out(self: _Stacked) -> int:
        return self.lora_B.shape[0]

    @property
    def d_in(self: _Stacked) -> int:
        """Columns of the update; of a convolution, channels times the size of the kernel."""
        return self.lora_A[0].numel()

    @property
    def rank(self: _Stacked) -> int:
        return self.lora_A.shape[0] // self.num_products

    def products(self: _Stacked) -> list[tuple[Tensor, Tensor]]:
        """(lora_B (d_out, rank), lora_A (rank, d_in)) of each product that the factors stack, as views."""
        return products(self.lora_B, self.lora_A, self.num_products)

    @torch.no_grad()
    def set_factors(self: _Stacked, lora_A: Tensor, lora_B: Tensor) -> None:
        """Put new factors, of any rank, into the same two Parameter objects, and delete their gradients.

        The new factors have their own storage, the old dtype and the old device. References to the Parameters, in
        optimizers and hooks for example, stay valid.
        """
        for parameter, value in ((self.lora_A, lora_A), (self.lora_B, lora_B)):
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
    d_out = layer.d_out
    d_in = layer.d_in
    rank = lora_A.shape[0] // layer.num_products
    rows = rank * layer.num_products
    sizes = [(*factor.flatten(1).shape,) for factor in (lora_A, lora_B)]
    alike = lora_A.ndim == layer.lora_A.ndim and lora_B.ndim == layer.lora_B.ndim
    if sizes != [(rows, d_in), (d_out, rows)] or not alike or not 1 <= rank <= (most or rank):
        raise ConfigurationError(
            f"the checkpoint's factors of {name!r} are {[*lora_A.shape]} and {[*lora_B.shape]}, "
            f"no LoRA update of a ({d_out}, {d_in}) layer; load it into the model that it was saved from",
            "ckpt_path",
        )
    if rank != layer.rank:
        layer.set_factors(layer.lora_A.new_empty(rows, d_in), layer.lora_B.new_empty(d_out, rows))
