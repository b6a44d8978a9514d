"""The LoRA layer: a frozen base, two factors, one scaling, and a rank that its checkpoint decides."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dynrank.errors import ConfigurationError
from dynrank.kernels.backends import Backend
from dynrank.linalg import OfShape, products
from dynrank.rank_map import FREE, RankBounds


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
    """What :class:`OfFactors` reads."""

    @property
    def lora_A(self) -> nn.Parameter: ...

    @property
    def lora_B(self) -> nn.Parameter: ...

    @property
    def num_products(self) -> int: ...


class OfFactors(OfShape):
    """What the factors of a layer say about it; a base of every class of layers."""

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


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of ``parameter``, also if DeepSpeed's ZeRO-3 has partitioned it and left an empty tensor."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def initial_scaling(alpha: float, rank: int, rslora: bool) -> float:
    """Scaling at the start: alpha / rank (arXiv:2106.09685), or alpha / sqrt(rank) for rsLoRA (arXiv:2312.03732)."""
    return alpha / (rank**0.5 if rslora else rank)


# nn.Module is the first base, because FSDP2 assigns another class to the layer, and that needs its layout.
class LoRALayer(nn.Module, OfFactors):
    """A frozen layer plus ``scaling * lora_B @ lora_A`` (Hu et al., arXiv:2106.09685, section 4.1).

    The layer stores ``scaling``, and ``alpha = scaling * rank`` follows from it, so a change of rank keeps the scaling.

    The constructor copies ``factors``, a pair (lora_A, lora_B), or draws new factors if that is None. ``base`` stays as
    it is; it is frozen when the layer is put into a model. The other arguments are as in :func:`dynrank.add_lora`,
    which checks them. Embeddings and convolutions always use torch and not the ``backend``.

    Attributes:
        lora_A: (rank, d_in), at first Kaiming-uniform.
        lora_B: (d_out, rank), at first zero, so that the update starts at zero.
        bounds: what the rank may become, by the rule of the rank map; a rank map of the schedule goes before it.
        rule: the key of the rank map that set its rank; None if no key did.
    """

    # The class of layer that a subclass adapts.
    supported: type[nn.Module]
    # Only PEFT's layers can be merged and still be LoRA layers.
    merged = False

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        backend: Backend = "auto",
        factors: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        d_out, d_in = self.shape_of(base)
        self.num_products = self.num_products_of(base)
        self.backend: Backend = backend
        self.base = base
        self.scaling = float(scaling)
        self.dropout = nn.Dropout(dropout)
        self.bounds = FREE
        self.rule: str | None = None
        place: dict[str, Any] = {"device": base.get_parameter("weight").device, "dtype": dtype}
        if factors is None:
            self.lora_A = nn.Parameter(torch.empty(rank * self.num_products, d_in, **place))
            self.lora_B = nn.Parameter(torch.zeros(d_out, rank * self.num_products, **place))
            self.init_A()
        else:
            lora_A, lora_B = (factor.detach().to(**place, copy=True).contiguous() for factor in factors)
            self.lora_A = nn.Parameter(lora_A)
            self.lora_B = nn.Parameter(lora_B)
        self.register_load_state_dict_pre_hook(_take_rank_of_checkpoint)  # type: ignore[no-untyped-call]

    @classmethod
    def shape_of(cls, base: nn.Module) -> tuple[int, int]:
        """(d_out, d_in) of the update of ``base``: by default the shape of its weight."""
        d_out, d_in = whole_shape(base.get_parameter("weight"))
        return d_out, d_in

    @classmethod
    def num_products_of(cls, base: nn.Module) -> int:
        """How many products the factors stack: one, except in a layer of experts."""
        return 1

    def init_A(self) -> None:
        """Draw lora_A in place, from the same distribution as PEFT."""
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    @property
    def alpha(self) -> float:
        return self.scaling * self.rank

    def trained_in_base(self) -> list[str]:
        """Names of the base's own parameters that somebody has unfrozen, such as its bias."""
        return [name for name, value in self.base.named_parameters(recurse=False) if value.requires_grad]

    @property
    def module(self) -> nn.Module:
        """The module whose input and output are those of the layer: itself."""
        return self

    @property
    def weight(self) -> nn.Parameter:
        """The base's weight, because some models read a layer's dtype or device from it."""
        weight: Any = self.base.weight
        return weight  # type: ignore[no-any-return]

    @property
    def bias(self) -> nn.Parameter | None:
        return getattr(self.base, "bias", None)

    def get_extra_state(self) -> Tensor:
        """The scaling, so that a state dict determines the layer's function; float64 scalar."""
        return torch.tensor(self.scaling, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        # torch.distributed.checkpoint passes a placeholder if it has no extra state.
        if isinstance(state, Tensor):
            self.scaling = float(state)

    def set_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Put new factors, of any rank, into the same two Parameter objects, and delete their gradients.

        The new factors have their own storage, the old dtype and the old device. References to the Parameters, in
        optimizers and hooks for example, stay valid.
        """
        put_factors(self, lora_A, lora_B)

    def delta_weight(self) -> Tensor:
        """``scaling * lora_B @ lora_A`` in the shape of the base's weight, float32 or wider."""
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        return self._in_weight_shape(self.scaling * (self.lora_B.to(wide) @ self.lora_A.to(wide)))

    def _in_weight_shape(self, delta_OI: Tensor) -> Tensor:
        return delta_OI

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """The base with the update added to its weight, to replace the layer; do not use the layer afterwards.

        If the weight was tied to another module, that module keeps the old weight.
        """
        self._put_weight(nn.Parameter(self.merged_weight(), requires_grad=False))
        return self.base

    def merged_weight(self) -> Tensor:
        """The base's weight plus the update, in the dtype of the weight."""
        old = self.weight
        delta = self.delta_weight()
        wide = torch.promote_types(old.dtype, delta.dtype)
        return (old.to(wide) + delta.to(wide)).to(old.dtype)

    def _put_weight(self, weight: nn.Parameter) -> None:
        self.base.weight = weight

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling:g}"


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


def _take_rank_of_checkpoint(layer: LoRALayer, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    if hasattr(layer.lora_A, "ds_id"):
        # DeepSpeed's ZeRO-3 loads its partitions by itself, and their sizes stay.
        return
    factors = (state_dict.get(prefix + factor) for factor in ("lora_A", "lora_B"))
    take_rank(layer, prefix.removesuffix("."), *factors, most=layer.max_rank)
