"""LoRA in parameters that no linear layer holds (PEFT's ``target_parameters``): stacks of experts, routers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from dynrank.layers.base import LoRALayer


class BareParameter(nn.Module):
    """A parameter of a module, seen as a module that has it for its weight; it owns nothing.

    Args:
        owner: the module.
        leaf: the parameter's name in it.
    """

    def __init__(self, owner: nn.Module, leaf: str) -> None:
        super().__init__()
        # In a list the owner isn't registered as a part of this module.
        self._owner, self.leaf = [owner], leaf

    @property
    def owner(self) -> Any:
        return self._owner[0]

    @property
    def weight(self) -> nn.Parameter:
        weight: nn.Parameter = getattr(self.owner, self.leaf)
        return weight


class LoRAOwner(nn.Module):
    """A module with LoRA in some of its own parameters; a subclass computes what the module does.

    Attributes:
        base: the plain module.
        lora: the layers by the name of the parameter. One more name in front of theirs, or transformers would take the
            factors for the parameters themselves and split them when it saves the model.
    """

    def __init__(self, base: nn.Module, layers: Mapping[str, LoRAParameter]) -> None:
        super().__init__()
        self.base, self.lora = base, nn.ModuleDict(layers)


class LoRAParameter(LoRALayer):
    """The update of a bare parameter. It is called by the :class:`LoRAOwner` around it."""

    base: BareParameter
    # What stands where the parameter's owner stood.
    around: type[LoRAOwner]
    # Nobody computes z = A x for each example.
    observe = None  # type: ignore[assignment]

    def _put_weight(self, base: nn.Module, weight: nn.Parameter) -> None:
        assert isinstance(base, BareParameter)
        setattr(base.owner, base.leaf, weight)


def stand_ins(layers: Iterable[LoRALayer]) -> list[LoRALayer | LoRAOwner]:
    """What stands where the layers' bases stood: each layer, but for those of parameters the module around them."""
    found: list[LoRALayer | LoRAOwner] = []
    by_owner: dict[nn.Module, dict[str, LoRAParameter]] = {}
    for layer in layers:
        if isinstance(layer, LoRAParameter):
            by_owner.setdefault(layer.base.owner, {})[layer.base.leaf] = layer
        else:
            found.append(layer)
    return found + [next(iter(own.values())).around(owner, own) for owner, own in by_owner.items()]
