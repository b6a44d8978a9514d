"""LoRA in bare parameters, which no linear layer holds (PEFT's ``target_parameters``): stacks of experts, and routers.

Transformers 5.0 and later stack the weights of a mixture of experts in 3-D parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynrank.errors import ConfigurationError
from dynrank.layers.foreign import class_if_imported
from dynrank.layers.lora_layer import LoRALayer
from dynrank.linalg import split
from dynrank.private import gated, is_expert_parallel


class BareParameter(nn.Module):
    """A module whose weight is the parameter ``leaf`` of another module, ``owner``; it registers nothing itself."""

    def __init__(self, owner: nn.Module, leaf: str) -> None:
        super().__init__()
        # The list keeps torch from registering the owner as a child of this module.
        self._owner = [owner]
        self.leaf = leaf

    @property
    def owner(self) -> Any:
        return self._owner[0]

    @property
    def weight(self) -> nn.Parameter:
        weight: nn.Parameter = getattr(self.owner, self.leaf)
        return weight


class LoRAOwner(nn.Module):
    """A module with LoRA in some of its own parameters; a subclass computes what the module does.

    ``base`` is the plain module, ``lora`` has the layers by the name of their parameter. The prefix ``lora.`` keeps
    transformers from taking the factors for the parameters themselves and splitting them when it saves the model.
    """

    def __init__(self, base: nn.Module, layers: Mapping[str, LoRAParameter]) -> None:
        super().__init__()
        self.base = base
        self.lora = nn.ModuleDict(layers)


class LoRAParameter(LoRALayer):
    """The update of a bare parameter, which only the :class:`LoRAOwner` around it calls."""

    base: BareParameter
    # The class that replaces the parameter's owner.
    around: type[LoRAOwner]

    def trained_in_base(self) -> list[str]:
        """Names of all parameters of the owner that somebody has unfrozen, such as the biases of its experts."""
        return [name for name, value in self.base.owner.named_parameters() if value.requires_grad]

    def _put_weight(self, weight: nn.Parameter) -> None:
        setattr(self.base.owner, self.base.leaf, weight)


def stand_ins(layers: Iterable[LoRALayer]) -> list[LoRALayer | LoRAOwner]:
    """The modules that replace the layers' bases: each layer itself, or for bare parameters a module around them."""
    found: list[LoRALayer | LoRAOwner] = []
    by_owner: dict[nn.Module, dict[str, LoRAParameter]] = {}
    for layer in layers:
        if isinstance(layer, LoRAParameter):
            by_owner.setdefault(layer.base.owner, {})[layer.base.leaf] = layer
        else:
            found.append(layer)
    return found + [next(iter(own.values())).around(owner, own) for owner, own in by_owner.items()]


class ExpertStack(BareParameter):
    """The stacked weights of a module of experts.

    (experts, d_out, d_in), or (experts, d_in, d_out) where the owner ``is_transposed``.
    """

    @property
    def weight_EIO(self) -> Tensor:
        return self.weight if self.owner.is_transposed else self.weight.mT


def expert_stacks(owner: nn.Module) -> dict[str, ExpertStack]:
    """The stacked parameters of ``owner`` by name, if it is a module of experts that :func:`experts_forward` supports.

    These are the classes with transformers' ``use_experts_implementation``, which sets the attributes read here.
    """
    if not {"has_bias", "is_transposed"} <= vars(owner).keys() or is_expert_parallel(owner):
        return {}
    stacks = {name: ExpertStack(owner, name) for name in (_up(owner), "down_proj")}
    plain = all(stack.weight.ndim == 3 and stack.weight.is_floating_point() for stack in stacks.values())
    return stacks if plain else {}


class LoRAExperts(LoRAOwner):
    """A module of experts with LoRA.

    It multiplies each token by A and B of that token's experts. PEFT instead adds the update to the weights of all
    experts, and saves the sum for the backward pass.
    """

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return experts_forward(self.base, hidden_states, top_k_index, top_k_weights, self.lora)


class LoRAExpertStack(LoRAParameter):
    """The update of one stacked parameter: one product per expert, all of the same rank.

    The factors are stacked as PEFT stores them: lora_A is (experts * rank, d_in), lora_B (d_out, rank * experts), see
    :func:`dynrank.linalg.split`.
    """

    supported = ExpertStack
    base: ExpertStack
    around = LoRAExperts

    @classmethod
    def shape_of(cls, base: nn.Module) -> tuple[int, int]:
        assert isinstance(base, ExpertStack)
        _, d_in, d_out = base.weight_EIO.shape
        return d_out, d_in

    @classmethod
    def num_products_of(cls, base: nn.Module) -> int:
        assert isinstance(base, ExpertStack)
        return len(base.weight)

    def delta_weight(self) -> Tensor:
        """``scaling * B_e @ A_e`` of every expert in the shape of the base's weight, float32 or wider."""
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        delta_EOI = self.scaling * torch.stack(
            [lora_B.to(wide) @ lora_A.to(wide) for lora_B, lora_A in self.products()]
        )
        return delta_EOI.mT.contiguous() if self.base.owner.is_transposed else delta_EOI

    def forward(self, x_SI: Tensor, ends: Tensor) -> Tensor:
        """``x W_e^T + scaling * (drop(x) A_e^T) B_e^T``; rows are sorted by expert; those of e end at ``ends[e]``."""
        x_SI = x_SI.to(self.base.weight.dtype)
        return grouped_lora(
            x_SI, self.dropout(x_SI), self.base.weight_EIO, self.lora_A, self.lora_B, self.scaling, ends
        )


def grouped_lora(
    x_SI: Tensor,
    dropped_SI: Tensor,
    weight_EIO: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    ends: Tensor,
) -> Tensor:
    """``x W_e^T + scaling * (dropped A_e^T) B_e^T`` of rows sorted by expert; those of e end at ``ends[e]``.

    ``lora_A`` is (experts * rank, d_in) and ``lora_B`` (d_out, rank * experts), see :func:`dynrank.linalg.split`.
    """
    experts = len(weight_EIO)
    # grouped_mm needs rows of a multiple of 16 bytes, so zeros pad the rank.
    missing = -(len(lora_A) // experts) % 8
    a_ERI = F.pad(split(lora_A, experts, 0), (0, 0, 0, missing)).to(x_SI.dtype)
    b_ERO = F.pad(split(lora_B, experts, 1), (0, 0, 0, missing)).to(x_SI.dtype).contiguous()
    z_SR = grouped_product(dropped_SI, a_ERI.mT, ends)
    return grouped_product(x_SI, weight_EIO, ends) + scaling * grouped_product(z_SR, b_ERO, ends)


# What multiplies rows, sorted by expert and with the end of each, by one stacked weight with its update.
StackLayer = Callable[[Tensor, Tensor], Tensor]


def experts_forward(
    owner: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    layers: Mapping[str, StackLayer] | nn.ModuleDict | None = None,
) -> Tensor:
    """The output of the experts of ``owner`` for each token, with LoRA in ``layers``.

    ``hidden_states`` is (tokens, d). ``top_k_index`` and ``top_k_weights`` are (tokens, k): the experts of each token,
    and the weights of their outputs. ``layers`` are by the name of their parameter.
    """
    experts, order = top_k_index.flatten().sort(stable=True)
    ends = torch.searchsorted(experts, torch.arange(len(owner.down_proj), device=experts.device), right=True).int()

    def linear(leaf: str, x_SI: Tensor) -> Tensor:
        if layers is not None and leaf in layers:
            y_SO: Tensor = layers[leaf](x_SI, ends)
        else:
            weight_EIO = ExpertStack(owner, leaf).weight_EIO
            y_SO = grouped_product(x_SI.to(weight_EIO.dtype), weight_EIO, ends)
        return y_SO + getattr(owner, f"{leaf}_bias")[experts] if owner.has_bias else y_SO

    up = linear(_up(owner), hidden_states[order // top_k_index.shape[1]])
    down = linear("down_proj", gated(owner, up) if _has_gate(owner) else owner.act_fn(up))
    if getattr(owner, "has_post_expert_norm", False):
        down = owner.post_expert_norm(down)
    weighted = down * top_k_weights.flatten()[order, None]
    by_token = weighted[order.argsort()].view(*top_k_index.shape, weighted.shape[-1])
    return by_token.sum(1).to(hidden_states.dtype)


def grouped_product(x_SI: Tensor, w_EIO: Tensor, ends: Tensor) -> Tensor:
    """(S, O): each row of ``x_SI`` times the matrix of its group; the rows of group e end before ``ends[e]``."""
    if _has_grouped_mm(x_SI, w_EIO):
        return F.grouped_mm(x_SI, w_EIO, offs=ends)
    rows = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([x @ w for x, w in zip(torch.split(x_SI, rows), w_EIO, strict=True)])


def _has_grouped_mm(x_SI: Tensor, w_EIO: Tensor) -> bool:
    # torch.compile supports grouped_mm in bfloat16 only (torch 2.13).
    dtypes = (torch.bfloat16,) if torch.compiler.is_compiling() else (torch.bfloat16, torch.float32, torch.float16)
    known = hasattr(F, "grouped_mm") and x_SI.dtype in dtypes
    if x_SI.is_cuda and torch.cuda.get_device_capability(x_SI.device) < (8, 0):
        return False
    return known and all(width * x_SI.element_size() % 16 == 0 for width in w_EIO.shape[1:])


def _up(owner: Any) -> str:
    return "gate_up_proj" if _has_gate(owner) else "up_proj"


def _has_gate(owner: Any) -> bool:
    # In transformers 5.0 all experts have a gate, and the attribute does not exist yet.
    return bool(getattr(owner, "has_gate", True))


class RouterWeight(BareParameter):
    """The (experts, d) weight of a router."""


def router_weight(owner: nn.Module) -> dict[str, RouterWeight]:
    """{"weight": the weight of ``owner``} if it is a matrix and owner no layer of torch: most likely a router."""
    weight = dict(owner.named_parameters(recurse=False, remove_duplicate=False)).get("weight")
    layers = (nn.Linear, nn.Embedding, class_if_imported("transformers.pytorch_utils.Conv1D"))
    layer = isinstance(owner, layers) or type(owner).__module__.startswith("torch.nn.")
    if layer or weight is None or weight.ndim != 2 or not weight.is_floating_point():
        return {}
    return {"weight": RouterWeight(owner, "weight")}


class LoRARouter(LoRAOwner):
    """A router that computes with the sum of its weight and the update, as PEFT's does."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Another thread may use the router at the same time, so only a copy gets the sum; it shares everything else.
        router = copy.copy(self.base)
        vars(router)["_parameters"] = {**self.base._parameters, "weight": self.lora["weight"]()}
        return router(*args, **kwargs)


class LoRARouterWeight(LoRAParameter):
    """The update of a router's weight. The matrix is small, so each forward adds the two."""

    supported = RouterWeight
    around = LoRARouter

    def __init__(self, base: nn.Module, *, dropout: float = 0.0, **options: Any) -> None:
        if dropout:
            raise ConfigurationError(
                f"dropout must be 0 for LoRA in a router, got {dropout}; set dropout=0, or leave routers out of "
                "target_modules",
                "dropout",
                "target_modules",
            )
        super().__init__(base, **options)

    def forward(self) -> Tensor:
        """``W + scaling * B A``, (d_out, d_in) in the dtype of W."""
        return self.merged_weight()
