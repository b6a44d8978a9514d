"""LoRA in routers: modules that score the experts for each token with a weight of their own, each class differently."""

import copy
from typing import Any

from torch import Tensor, nn

from dynrank.errors import ConfigurationError
from dynrank.layers.bare import BareParameter, LoRAOwner, LoRAParameter
from dynrank.private import imported


class RouterWeight(BareParameter):
    """The (experts, d) weight of a router."""


def router_weight(owner: nn.Module) -> dict[str, RouterWeight]:
    """{"weight": the weight of ``owner``} if it is a matrix and owner no layer of torch: most likely a router."""
    weight = owner._parameters.get("weight")
    layers = (nn.Linear, nn.Embedding, imported("transformers.pytorch_utils.Conv1D"))
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
                f"dropout must be 0 for LoRA in a router, got {dropout}; set lora.dropout=0, or leave routers out of "
                "lora.target_modules"
            )
        super().__init__(base, **options)

    @classmethod
    def shape_of(cls, base: nn.Module) -> tuple[int, int]:
        assert isinstance(base, RouterWeight)
        d_out, d_in = base.weight.shape
        return d_out, d_in

    def forward(self) -> Tensor:
        """``W + scaling * B A``, (d_out, d_in) in the dtype of W."""
        return self.merged_weight(self.base)
