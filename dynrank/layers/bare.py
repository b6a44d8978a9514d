"""LoRA in bare parameters, which no linear layer holds (PEFT's ``target_parameters``): stacks of experts, routers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from dynrank.layers.base import LoRALayer


class BareParameter(nn.Module):
    """A module whose weight is the parameter ``leaf`` of another module, ``owner``; it registers nothing itself."""

    def __init__(self, owner: nn.Module, leaf: str) -> None:
        super().__init__()
        # The list keeps torch from registering the owner as a child of this module.
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

    ``base`` is the plain module, ``lora`` has the layers by the name of their parameter. The prefix ``lora.`` keeps
    transformers from taking the factors for the parameters themselves and splitting them when it saves the model.
    """

    def __init__(self, base: nn.Module, layers: Mapping[str, LoRAParameter]) -> None:
        super().__init__()
        self.base, self.lora = base, nn.ModuleDict(layers)


class LoRAParameter(LoRALayer):
    """The update of a bare parameter, which only the :class:`LoRAOwner` around it calls."""

    base: BareParameter
    # The class that replaces the parameter's owner.
    around: type[LoRAOwner]
    # z = A x is not computed separately for each example.
    observe = None  # type: ignore[assignment]

    def _put_weight(self, base: nn.Module, weight: nn.Parameter) -> None:
        assert isinstance(base, BareParameter)
        setattr(base.owner, base.leaf, weight)


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
