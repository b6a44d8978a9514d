"""Targets that set the rank of each layer separately: to a number, or by its singular values."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from dynrank.errors import ConfigurationError, Count, Name, Share, checked
from dynrank.linalg import energy_rank
from dynrank.patterns import by_layer
from dynrank.targets.base import LayerState, Target

# One rank for all layers, or {key: rank} with the keys of dynrank.patterns.by_layer.
RankByKey = Count | Annotated[Mapping[Name, Count], Field(min_length=1)]


def _of_layers(rank: int | Mapping[str, int], layers: Mapping[str, LayerState]) -> dict[str, int]:
    """The rank for each layer; a layer that no key means keeps its own."""
    own = {name: layer.rank for name, layer in layers.items()}
    return own | by_layer(rank, layers) if isinstance(rank, Mapping) else dict.fromkeys(layers, rank)


@checked
class Rank(Target):
    """At most this rank for all layers; a layer below it keeps its rank.

    Args:
        rank: the rank, or {key: rank} for some layers. A key is a layer's name, which goes before all others,
            "attention", "mlp", or a pattern as in a rank map, of which the first that matches a layer wins; layers that
            no key means keep their rank.

    Raises:
        ConfigurationError: if a value is out of range; from :meth:`ranks` if a key means no layer.

    >>> layers = {"h.0.attn.q": LayerState(16), "h.0.mlp.up": LayerState(16), "head": LayerState(16)}
    >>> Rank({"attention": 8, "mlp": 4}).ranks(layers)
    {'h.0.attn.q': 8, 'h.0.mlp.up': 4, 'head': 16}
    """

    rank: RankByKey

    def ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        wanted = _of_layers(self.rank, layers)
        return {name: layer.shrunk(wanted[name]) for name, layer in layers.items()}


@checked
class GrowTo(Target):
    """At least this rank for all layers, or for those that a key means, as in :class:`Rank`; none is lowered.

    >>> GrowTo({"attention": 8}).ranks({"h.0.attn.q": LayerState(4), "h.0.mlp.up": LayerState(4)})
    {'h.0.attn.q': 8, 'h.0.mlp.up': 4}
    """

    rank: RankByKey

    def ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        wanted = _of_layers(self.rank, layers)
        return {name: layer.grown(wanted[name]) for name, layer in layers.items()}


@checked
class Unchanged(Target):
    """The rank that each layer has, so that a change only balances the factors.

    In the last stage, layers with a final rank in the rank map are cut to it.

    >>> Unchanged().ranks({"layer": LayerState(rank=16)})
    {'layer': 16}
    """

    def ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        return {name: layer.shrunk(layer.rank) for name, layer in layers.items()}


@checked
class Towards(Target):
    """Step ``step`` of ``steps`` from the starting rank to ``rank``, by equal factors: 64, 32, 16, 8.

    Args:
        rank: rank after the last step; a layer with a final rank in the rank map ends at that.
        step: 1 to ``steps``.
        steps: how many steps there are.

    >>> Towards(8, step=1, steps=3).ranks({"layer": LayerState(rank=64)})
    {'layer': 32}
    """

    rank: Count
    step: Count = 1
    steps: Count = 1

    def __post_init__(self) -> None:
        if self.step > self.steps:
            raise ConfigurationError(f"step must be at most steps = {self.steps}, got {self.step}", "step", "steps")

    def ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        # The rank now is the one after ``step - 1`` steps.
        ahead = self.steps - self.step + 1
        factors = {
            name: ((layer.final_rank or self.rank) / layer.rank) ** (1 / ahead) for name, layer in layers.items()
        }
        return {name: layer.shrunk(round(layer.rank * factors[name])) for name, layer in layers.items()}


@checked
class Energy(Target):
    """The lowest rank that keeps ``share`` of each layer's energy, the sum of SQUARED singular values.

    A layer keeps at least rank ``lowest``.

    >>> import torch
    >>> Energy(0.9).ranks({"layer": LayerState(4, values=torch.tensor([4.0, 1.0, 0.1, 0.1]))})
    {'layer': 1}
    """

    share: Share
    lowest: Count = Field(default=1, kw_only=True)

    needs = ("values",)

    def ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        return {name: layer.shrunk(self._next(layer)) for name, layer in layers.items()}

    def _next(self, layer: LayerState) -> int:
        assert layer.values is not None
        return max(self.lowest, energy_rank(layer.values, self.share))
