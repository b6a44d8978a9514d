"""The LoRA layer of dynrank: a frozen base, two factors, one scaling, and a rank that its checkpoint decides."""

from typing import Any

import torch
from torch import Tensor, nn

from dynrank.kernels.backends import Backend
from dynrank.layers.partitioned import is_partitioned, whole_shape
from dynrank.layers.ranked_layer import OfFactors, take_rank
from dynrank.rank_map import FREE


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


def _take_rank_of_checkpoint(layer: LoRALayer, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    if is_partitioned(layer.lora_A):
        # DeepSpeed loads its partitions by itself, and their sizes stay.
        return
    factors = (state_dict.get(prefix + factor) for factor in ("lora_A", "lora_B"))
    take_rank(layer, prefix.removesuffix("."), *factors, most=layer.max_rank)
