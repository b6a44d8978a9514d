"""Targets that weigh the directions of all layers against each other, and keep those that are worth most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from math import floor, fsum, inf
from typing import Annotated

from pydantic import ByteSize, Field

from dynrank.errors import ConfigurationError, Count, Share, validated
from dynrank.targets.base import UNBOUNDED, LayerState, Stepped, up_to_multiple

# A budget has one of these sizes; each is a key under schedule, too.
_SIZES = ("parameters", "share", "final_rank", "bytes")


@validated("schedule.target", kw_only=True)
class Shared(Stepped):
    """Ranks by what the directions of all layers are worth per parameter, not above ``highest`` or a layer's own cap.

    A direction is worth what the loss loses with it where gates were watched, else its squared singular value, by which
    comparing layers is a heuristic.
    """

    highest: Count | None = None

    needs = ("values",)

    def __post_init__(self) -> None:
        if self.highest is not None and self.least() > self.highest:
            raise ConfigurationError(
                f"highest must be at least {self.least()}, which is lowest = {self.lowest} as a multiple of "
                f"{self.multiple}, got {self.highest}; set schedule.highest, schedule.lowest or schedule.multiple"
            )

    def lowest_ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        """The smallest ranks that there are to start from."""
        return {name: self._choices(layer)[0] for name, layer in layers.items()}

    def order(self, layers: Mapping[str, LayerState]) -> list[tuple[str, int]]:
        """(layer, its next rank) of every step up from the lowest ranks, what is worth most per parameter first."""
        return [(name, rank) for _, name, rank in sorted(s for item in layers.items() for s in self._steps(*item))]

    def reach(self, layer: LayerState) -> tuple[int, int]:
        choices = self._choices(layer)
        # a layer of fewer directions may stay at `highest`, be that a multiple or not, and the reach does not fall
        return choices[0], max(choices[-1], layer.shrunk(self._cap(layer)))

    def _choices(self, layer: LayerState) -> list[int]:
        """The ranks that a layer may get, ascending: multiples below the rank now, and staying as it is."""
        low = max(self.lowest, layer.lowest)
        top = min(layer.highest, self._cap(layer))
        # A layer that has less than the lowest rank stays as it is.
        if layer.rank <= low or layer.lowest == layer.highest:
            return [layer.shrunk(layer.rank)]
        below = [*range(up_to_multiple(low, self.multiple), min(top, layer.rank - 1) + 1, self.multiple)]
        choices = [*below, layer.rank] if layer.rank <= top else below
        # The layer's own bounds come before those of the budget.
        return choices or [max(low, top)]

    def _cap(self, layer: LayerState) -> int:
        return layer.cap or self.highest or layer.rank

    def _steps(self, name: str, layer: LayerState) -> Iterator[tuple[float, str, int]]:
        """Each step to a next rank: (minus its worth per parameter, name, that rank), to be sorted."""
        assert layer.values is not None
        worth = layer.values.double().square()
        density = inf
        for below, above in pairwise(self._choices(layer)):
            size = (above - below) * layer.cost
            # The worth per parameter never rises along a layer's steps, whatever rounding does.
            density = min(density, fsum(worth[below:above].tolist()) / size)
            if density > 0:
                yield -density, name, above


@validated("schedule.target")
class Budget(Shared):
    """One pool of adapter parameters for all layers, shared out so that what is kept is worth much.

    Every layer starts from its lowest rank; then the step to a layer's next rank that is worth most per parameter is
    taken again and again, as long as it fits. What is kept falls short of the best possible by less than one step is
    worth, and not at all where all steps cost the same.

    Args:
        parameters: of all layers together after the change (pinned ones included); exactly one of the sizes is given.
        share: the same as a share of the parameters now, in (0, 1]; the lowest ranks are kept in any case.
        final_rank: as many parameters as this rank has, if all layers go down to it.
        left: changes of this kind that are still to come: the pool goes 1 / (left + 1) of the way, by a factor.
        bytes: of all layers together in float32, as a number or a text: "8MiB".
        lowest: rank that every layer keeps (one that has less stays).
        highest: rank that no layer exceeds, but for those of which the rank map says another; None: its rank now.
        multiple: of which new ranks are multiples; a layer may also stay as it is.

    Raises:
        ConfigurationError: if a value is out of range; from :meth:`ranks` if ``parameters`` are below the lowest ranks.

    >>> from torch import tensor
    >>> first, second = tensor([3.0, 1.0]), tensor([2.0, 1.7])
    >>> layers = {"q": LayerState(2, 5, 5, values=first), "v": LayerState(2, 5, 5, values=second)}
    >>> Budget(parameters=30).ranks(layers)
    {'q': 1, 'v': 2}
    """

    parameters: Annotated[int, Field(ge=0)] | None = None
    share: Share | None = None
    final_rank: Count | None = Field(default=None, kw_only=True)
    left: Annotated[int, Field(ge=0)] = Field(default=0, kw_only=True)
    bytes: ByteSize | None = Field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {name: getattr(self, name) for name in _SIZES if getattr(self, name) is not None}
        if len(given) != 1:
            raise ConfigurationError(
                f"a budget has one size, got {given or 'none'}; set one of schedule.{', schedule.'.join(_SIZES)}, and "
                "the others to null"
            )

    def ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        ranks = self.lowest_ranks(layers)
        left, least = self.pool(layers), self.floor_parameters(layers)
        if self.share is None and left < least:
            raise ConfigurationError(f"a budget must be at least {least:,} parameters, the lowest ranks', got {left:,}")
        left -= least
        ended = set()
        for name, rank in self.order(layers):
            size = (rank - ranks[name]) * layers[name].cost
            if size > left:
                ended.add(name)
            elif name not in ended:
                ranks[name] = rank
                left -= size
        return ranks

    @property
    def key(self) -> str:
        """The configuration key of its size."""
        return next(f"schedule.{name}" for name in _SIZES if getattr(self, name) is not None)

    @property
    def is_relative(self) -> bool:
        """Whether the pool depends on the ranks before."""
        return self.share is not None or self.final_rank is not None or self.left > 0

    def pool(self, layers: Mapping[str, LayerState]) -> int:
        """Parameters that may be shared out to ``layers``."""
        now = sum(layer.rank * layer.cost for layer in layers.values())
        if self.parameters is not None:
            end = self.parameters
        elif self.bytes is not None:
            end = self.bytes // 4
        elif self.final_rank is not None:
            ends = (max(layer.lowest, min(layer.highest, self.final_rank)) * layer.cost for layer in layers.values())
            end = min(now, sum(ends))
        else:
            # Rounding must not matter: 0.29 * 100 is below 29 in floats.
            end = floor((self.share or 0.0) * now + 1e-9)
        return floor(now * (end / now) ** (1 / (self.left + 1)) + 1e-6) if self.left and now else end

    def starts(self) -> tuple[int, int]:
        return max(self.least(), self.final_rank or 1), UNBOUNDED

    def floor_parameters(self, layers: Mapping[str, LayerState]) -> int:
        """Parameters of the smallest ranks that the budget may be shared out to."""
        return sum(rank * layers[name].cost for name, rank in self.lowest_ranks(layers).items())


@validated("schedule.target")
class Smallest(Shared):
    """The smallest adapter that costs no more than ``How.max_regression`` allows.

    The driver takes steps of :meth:`order` up from :meth:`ranks`; how many are needed, it bisects by validations. The
    arguments are those of :class:`Budget`.
    """

    def ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        return self.lowest_ranks(layers)
