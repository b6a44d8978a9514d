"""The target that gives all layers one pool of parameters: by their importance, or by singular values."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from math import floor, fsum, inf
from typing import Annotated, Literal

from pydantic import ByteSize, Field

from dynrank.errors import ConfigurationError, Count, Share, checked
from dynrank.targets.base import LayerState, Target

# A budget has exactly one of these sizes.
_SIZES = ("parameters", "share", "final_rank", "bytes")


@checked
class Budget(Target):
    """One pool of adapter parameters for all layers, with ranks in proportion to the importance of each layer.

    The importance of a layer is the decrease of the loss by its updates (at least 0), plus its standard error. The pool
    is shared out as seats of a parliament are by votes, with the divisor method of Webster and Sainte-Laguë: every
    layer starts at its lowest rank, and the next step up always goes to the layer with the largest quotient of its
    importance and the mean of its ranks before and after the step. A layer whose next step does not fit the pool gets
    no more. Where nothing is known yet, ranks rise uniformly.
    Give exactly one size: ``parameters``, ``share``, ``final_rank`` or ``bytes``.

    ``by="weight"`` instead takes the steps with the largest squared singular values per parameter, which is a
    heuristic, but needs no training. The result is less than one step worse than the best choice by this measure.

    Args:
        parameters: parameters of all layers together after the change, pinned layers included.
        share: the size as a share of the present parameters, in (0, 1]. A schedule's first stage needs a share that
            suffices for the lowest ranks; later, and in :meth:`ranks`, every layer keeps its lowest rank in any case.
        final_rank: the number of parameters that all layers have at this rank, or at the nearest one that their shapes
            allow; pinned layers and those with a final rank count by their own.
        left: how many further changes to the same size follow; each of them shrinks the pool by the same factor.
        bytes: bytes of all layers together in float32, as a number or a text: "8MiB".
        lowest: lowest rank of every layer (a layer below it keeps its rank).
        highest: highest rank of every layer; None: its rank now. No layer grows. A layer with bounds of its own in the
            rank map keeps both: the higher ``lowest`` and the lower ``highest`` hold. Where they contradict each
            other, the rank map's hold.
        by: what ranks follow: the "importance" of layers, or "weight", the singular values of their updates.

    Raises:
        ConfigurationError: if a value is out of range; from :meth:`ranks`, but for ``share``, if the pool is below the
            lowest ranks.

    >>> layers = {"q": LayerState(8, 5, 5, importance=0.1), "v": LayerState(8, 5, 5, importance=0.3)}
    >>> Budget(parameters=80).ranks(layers)
    {'q': 2, 'v': 6}
    """

    parameters: Annotated[int, Field(ge=0)] | None = None
    share: Share | None = None
    final_rank: Count | None = Field(default=None, kw_only=True)
    left: Annotated[int, Field(ge=0)] = Field(default=0, kw_only=True)
    bytes: ByteSize | None = Field(default=None, kw_only=True)
    lowest: Count = Field(default=1, kw_only=True)
    highest: Count | None = Field(default=None, kw_only=True)
    by: Literal["importance", "weight"] = Field(default="importance", kw_only=True)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("importance",) if self.by == "importance" else ("values",)

    def __post_init__(self) -> None:
        if self.highest is not None and self.lowest > self.highest:
            raise ConfigurationError(
                f"highest must be at least lowest = {self.lowest}, got {self.highest}", "highest", "lowest"
            )
        given = {name: getattr(self, name) for name in _SIZES if getattr(self, name) is not None}
        if len(given) != 1:
            raise ConfigurationError(
                f"a budget has one size, got {given or 'none'}; give only one of {', '.join(_SIZES)}", *given or _SIZES
            )

    def ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        ranks = self.lowest_ranks(layers)
        unspent = self.pool(layers)
        least = self.floor_parameters(layers)
        if self.share is None and unspent < least:
            raise ConfigurationError(
                f"a budget must be at least {least:,} parameters, the lowest ranks', got {unspent:,}",
                self.size,
                "lowest",
            )
        unspent -= least
        ended = set()
        for name, rank in self.order(layers):
            size = (rank - ranks[name]) * layers[name].params_per_rank
            if size > unspent:
                ended.add(name)
            elif name not in ended:
                ranks[name] = rank
                unspent -= size
        return ranks

    @property
    def size(self) -> str:
        """The name of the argument that gives the size."""
        return next(name for name in _SIZES if getattr(self, name) is not None)

    @property
    def is_relative(self) -> bool:
        """Whether the ranks before the change decide if the pool suffices for the lowest ranks.

        Not so for ``final_rank``, whose pool is at most the present parameters: these suffice.
        """
        return self.share is not None or self.left > 0

    def pool(self, layers: Mapping[str, LayerState]) -> int:
        """How many parameters ``layers`` may have together after the change."""
        now = sum(layer.rank * layer.params_per_rank for layer in layers.values())
        if self.parameters is not None:
            end = self.parameters
        elif self.bytes is not None:
            end = self.bytes // 4
        elif self.final_rank is not None:
            uniform = sum(layer.uniform(self.final_rank) * layer.params_per_rank for layer in layers.values())
            end = min(now, uniform)
        else:
            # The small number cancels rounding errors: 0.29 * 100 is below 29 in floats.
            end = floor((self.share or 0.0) * now + 1e-9)
        return floor(now * (end / now) ** (1 / (self.left + 1)) + 1e-6) if self.left and now else end

    def floor_parameters(self, layers: Mapping[str, LayerState]) -> int:
        """Parameters of all layers at their lowest ranks."""
        return sum(rank * layers[name].params_per_rank for name, rank in self.lowest_ranks(layers).items())

    def lowest_ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        """The lowest rank that each layer may get."""
        return {name: self._choices(layer)[0] for name, layer in layers.items()}

    def highest_ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        """The highest rank that each layer may get, if the pool has enough for it."""
        return {name: self._choices(layer)[-1] for name, layer in layers.items()}

    def order(self, layers: Mapping[str, LayerState]) -> list[tuple[str, int]]:
        """(layer, its next rank) of every step up from the lowest ranks, the first one first.

        Steps of quotient zero are left out. But where nothing is known of any layer yet, ranks rise uniformly.
        """
        if self.by == "importance":
            nothing_known = not any(layer.importance for layer in layers.values())
        else:
            nothing_known = not any(layer.values.any() for layer in layers.values() if layer.values is not None)
        steps = sorted(step for item in layers.items() for step in self._steps(*item))
        return [(name, rank) for value, rank, name in steps if value < 0 or nothing_known]

    def _choices(self, layer: LayerState) -> list[int]:
        """The ranks that a layer may get, ascending."""
        low = max(self.lowest, layer.lowest)
        top = min(layer.highest, self.highest or layer.rank)
        # A layer at or below the lowest rank keeps its rank.
        if layer.rank <= low or layer.lowest == layer.highest:
            return [layer.shrunk(layer.rank)]
        # No choice is left where the bounds of layer and budget do not meet.
        return [*range(low, min(top, layer.rank) + 1)] or [layer.shrunk(max(low, top))]

    def _steps(self, name: str, layer: LayerState) -> Iterator[tuple[float, int, str]]:
        """(minus its quotient, next rank, name) of each step up; the step that comes first sorts first."""
        if self.by == "importance":
            # Webster's divisor is the mean of the ranks below and above: ranks in proportion to importance, rounded to
            # the nearest choice, go from one choice to the next halfway between the two.
            yield from (
                (-2 * (layer.importance or 0.0) / (below + above), above, name)
                for below, above in pairwise(self._choices(layer))
            )
            return
        assert layer.values is not None
        energies = layer.values.double().square()
        density = inf
        for below, above in pairwise(self._choices(layer)):
            size = (above - below) * layer.params_per_rank
            # The minimum keeps a layer's steps in order although rounding may let the energy per parameter rise.
            density = min(density, fsum(energies[below:above].tolist()) / size)
            yield -density, above, name
