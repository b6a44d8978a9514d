"""To what rank: pure functions from what is known of each layer to its next rank.

A shrink never raises a rank and a growth never lowers one; both stay within the bounds that a layer carries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, cos, floor, pi
from typing import ClassVar, Protocol

from torch import Tensor

from dynrank.errors import ConfigurationError
from dynrank.linalg import effective_rank, energy_rank, numerical_rank
from dynrank.targets.allocation import allocate

__all__ = [
    "Budget",
    "EffectiveRank",
    "Energy",
    "Exactly",
    "Factor",
    "FinalRanks",
    "GrowBy",
    "GrowTo",
    "LayerState",
    "NumericalRank",
    "Rank",
    "Target",
    "Towards",
]


@dataclass(frozen=True)
class LayerState:
    """What a target may know of a layer.

    Attributes:
        rank: its rank now.
        d_out, d_in: its shape.
        lowest, highest: bounds of its next rank (both the rank itself if it is pinned, both its own final rank in the
            last stage).
        final_rank: where the rank map wants it to end; None: no wish.
        values: singular values of its update in the metric of the change (scaling included), descending, ``rank``
            numbers; None where the target does not ask for them.
        scores: sensitivity of each direction, ``rank`` numbers in any order; None where the target does not ask.
    """

    rank: int
    d_out: int
    d_in: int
    lowest: int = 1
    highest: int = 2**31
    final_rank: int | None = None
    values: Tensor | None = None
    scores: Tensor | None = None

    @property
    def cost(self) -> int:
        """Parameters of one direction."""
        return self.d_out + self.d_in

    def shrunk(self, rank: int) -> int:
        """``rank`` brought within the bounds, never above the rank now."""
        return min(self.rank, max(self.lowest, min(self.highest, rank)))

    def grown(self, rank: int) -> int:
        """``rank`` brought within the bounds, never below the rank now."""
        return max(self.rank, min(self.highest, rank))


class Target(Protocol):
    """To what rank each layer should change.

    Attributes:
        needs: which of "values" and "scores" the target reads.
        multiple: ranks it yields are multiples of this, where bounds allow.
    """

    @property
    def needs(self) -> tuple[str, ...]: ...

    @property
    def multiple(self) -> int: ...

    def ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        """The next rank of every layer."""
        ...

    def reach(self, low: int, high: int) -> tuple[int, int]:
        """Lowest and highest rank that a free layer of rank ``low`` to ``high`` may come out at."""
        ...

    def fault(self, highest: int) -> str | None:
        """What contradicts a start where no layer is above rank ``highest``, with the field's name; None if nothing."""
        ...


def _check_int(target: object, name: str, least: int) -> None:
    value = getattr(target, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(f"{name} must be an int of at least {least}, got {value!r}; set schedule.{name}")


def _check_share(target: object, name: str) -> None:
    value = getattr(target, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ConfigurationError(f"{name} must be a share in (0, 1], got {value!r}; set schedule.{name}")


def _too_high(name: str, rank: int, highest: int) -> str | None:
    if rank <= highest:
        return None
    return f"{name} must be at most rank = {highest}, the highest at that stage, got {rank}"


def _no_multiple(multiple: int, lowest: int, highest: int) -> str | None:
    if _up_to_multiple(lowest, multiple) <= highest:
        return None
    return f"multiple must divide a rank between {lowest} and {highest}, got {multiple}"


@dataclass(frozen=True)
class _OneRank:
    rank: int
    needs: ClassVar[tuple[str, ...]] = ()
    multiple: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _check_int(self, "rank", 1)


@dataclass(frozen=True)
class Rank(_OneRank):
    """One rank for all layers; a layer that is already below stays."""

    def ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        return {name: layer.shrunk(self.rank) for name, layer in layers.items()}

    def reach(self, low: int, high: int) -> tuple[int, int]:
        return min(low, self.rank), min(high, self.rank)

    def fault(self, highest: int) -> str | None:
        return _too_high("rank", self.rank, highest)


SHAPES = ("geometric", "linear", "cosine")


@dataclass(frozen=True)
class Towards:
    """Step ``step`` of ``steps`` on the way to ``rank``, from wherever the layer stood before the first.

    Args:
        rank: where the way ends (a layer with a final rank of its own ends there).
        step: 1 to ``steps``.
        steps: of the whole way.
        shape: "geometric" (equal factors: 64, 32, 16, 8), "linear" (equal differences) or "cosine" (half a wave).

    >>> layer = LayerState(rank=64, d_out=100, d_in=100)
    >>> Towards(8, step=1, steps=3).ranks({"layer": layer})
    {'layer': 32}
    """

    rank: int
    step: int = 1
    steps: int = 1
    shape: str = "geometric"
    needs: ClassVar[tuple[str, ...]] = ()
    multiple: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _check_int(self, "rank", 1)
        _check_int(self, "steps", 1)
        if not 1 <= self.step <= self.steps:
            raise ConfigurationError(f"step must be between 1 and steps = {self.steps}, got {self.step}")
        if self.shape not in SHAPES:
            raise ConfigurationError(f"shape must be one of {SHAPES}, got {self.shape!r}; set schedule.shape")

    def ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        return {name: layer.shrunk(self._next(layer.rank, layer.final_rank)) for name, layer in layers.items()}

    def reach(self, low: int, high: int) -> tuple[int, int]:
        return tuple(min(rank, self._next(rank, None)) for rank in (low, high))  # type: ignore[return-value]

    def fault(self, highest: int) -> str | None:
        return _too_high("rank", self.rank, highest) if self.step == 1 else None

    def _next(self, rank: int, final_rank: int | None) -> int:
        """From the rank after ``step - 1`` steps, so that the start need not be remembered."""
        end, left = final_rank or self.rank, self.steps - self.step
        if rank <= end or left == 0:
            return end
        if self.shape == "geometric":
            return max(end, round(rank * float((end / rank) ** (1 / (left + 1)))))
        if self.shape == "linear":
            share = left / (left + 1)
        else:
            share = (1 + cos(pi * self.step / self.steps)) / (1 + cos(pi * (self.step - 1) / self.steps))
        return round(end + (rank - end) * share)


@dataclass(frozen=True)
class Factor:
    """The rank now times ``factor``, not below ``lowest``, rounded up to ``multiple``."""

    factor: float
    lowest: int = 1
    multiple: int = 1
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        _check_share(self, "factor")
        _check_int(self, "lowest", 1)
        _check_int(self, "multiple", 1)

    def ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        return {name: layer.shrunk(self._next(layer.rank)) for name, layer in layers.items()}

    def reach(self, low: int, high: int) -> tuple[int, int]:
        return min(low, self._next(low)), min(high, self._next(high))

    def fault(self, highest: int) -> str | None:
        return _too_high("lowest", self.lowest, highest) or _no_multiple(self.multiple, self.lowest, highest)

    def _next(self, rank: int) -> int:
        return _up_to_multiple(max(self.lowest, rank * self.factor), self.multiple)


class _BySpectrum:
    """A rank for each layer from its own singular values, not below ``lowest``, rounded up to ``multiple``."""

    lowest: int
    multiple: int
    needs: ClassVar[tuple[str, ...]] = ("values",)

    def __post_init__(self) -> None:
        _check_int(self, "lowest", 1)
        _check_int(self, "multiple", 1)

    def ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        return {
            name: layer.shrunk(_up_to_multiple(max(self.lowest, self._wanted(layer)), self.multiple))
            for name, layer in layers.items()
        }

    def reach(self, low: int, high: int) -> tuple[int, int]:
        return min(low, _up_to_multiple(self.lowest, self.multiple)), high

    def fault(self, highest: int) -> str | None:
        return _too_high("lowest", self.lowest, highest) or _no_multiple(self.multiple, self.lowest, highest)

    def _wanted(self, layer: LayerState) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class Energy(_BySpectrum):
    """The fewest directions that keep ``share`` of each layer's energy: the sum of SQUARED singular values."""

    share: float
    lowest: int = 1
    multiple: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share(self, "share")

    def _wanted(self, layer: LayerState) -> float:
        return energy_rank(_values(layer), self.share)


@dataclass(frozen=True)
class EffectiveRank(_BySpectrum):
    """The effective rank of each layer's update, exp of the entropy of its singular values (Roy and Vetterli, 2007)."""

    lowest: int = 1
    multiple: int = 1

    def _wanted(self, layer: LayerState) -> float:
        return effective_rank(_values(layer)) - 1e-9  # an exact integer stays itself


@dataclass(frozen=True)
class NumericalRank(_BySpectrum):
    """The singular values above ``tolerance`` times the largest; what is below is as good as zero."""

    tolerance: float = 1e-3
    lowest: int = 1
    multiple: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share(self, "tolerance")

    def _wanted(self, layer: LayerState) -> float:
        return numerical_rank(_values(layer), 1, self.tolerance)


SCORES = ("energy", "sensitivity")


@dataclass(frozen=True)
class Budget:
    """One pool of adapter parameters for all layers, shared out so that what is kept is worth most.

    A direction is worth its squared singular value; in the ``loss`` metric these have one unit over all layers
    (estimated loss), in ``weight`` and ``output`` comparing layers is a heuristic. The share-out is exactly optimal.

    Args:
        parameters: of all layers together after the change (pinned ones included); exactly one of this and ``share``.
        share: the same as a share of the parameters now, in (0, 1]; the lowest ranks are kept in any case.
        lowest: rank that every layer keeps (one that has less stays).
        highest: rank that no layer exceeds; None: its rank now.
        multiple: of which new ranks are multiples; a layer may also stay as it is.
        score: "energy", or "sensitivity": AdaLoRA's importance of a direction (arXiv:2303.10512, equations 8 to 11).

    Raises:
        ConfigurationError: if a value is out of range; from :meth:`ranks` if ``parameters`` are below the lowest ranks.
    """

    parameters: int | None = None
    share: float | None = None
    lowest: int = 1
    highest: int | None = None
    multiple: int = 1
    score: str = "energy"

    def __post_init__(self) -> None:
        _check_int(self, "lowest", 1)
        _check_int(self, "multiple", 1)
        if (self.parameters is None) == (self.share is None):
            raise ConfigurationError(
                f"a budget is either parameters or a share, got {self.parameters!r} and {self.share!r}; "
                "set schedule.parameters or schedule.share, and the other to null"
            )
        if self.parameters is not None:
            _check_int(self, "parameters", 0)
        else:
            _check_share(self, "share")
        if self.highest is not None:
            _check_int(self, "highest", self.lowest)
            fault = _no_multiple(self.multiple, self.lowest, self.highest)
            if fault:
                raise ConfigurationError(f"{fault}; set schedule.multiple, schedule.lowest or schedule.highest")
        if self.score not in SCORES:
            raise ConfigurationError(f"score must be one of {SCORES}, got {self.score!r}; set schedule.score")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("values",) if self.score == "energy" else ("scores",)

    def ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        states = list(layers.values())
        gains, choices = [self._gains(layer) for layer in states], [self._choices(layer) for layer in states]
        budget = self.pool(layers)
        if self.parameters is None:
            budget = max(budget, self.floor_parameters(layers))
        chosen = allocate(gains, [layer.cost for layer in states], choices, budget)
        return dict(zip(layers, chosen, strict=True))

    def pool(self, layers: Mapping[str, LayerState]) -> int:
        """Parameters that may be shared out to ``layers``."""
        if self.parameters is not None:
            return self.parameters
        now = sum(layer.rank * layer.cost for layer in layers.values())
        return floor((self.share or 0.0) * now + 1e-9)  # 0.29 * 100 is below 29

    def floor_parameters(self, layers: Mapping[str, LayerState]) -> int:
        """Parameters of the smallest ranks that the budget may be shared out to."""
        return sum(self._choices(layer)[0] * layer.cost for layer in layers.values())

    def reach(self, low: int, high: int) -> tuple[int, int]:
        top = high if self.highest is None else min(high, self.highest)
        return min(low, _up_to_multiple(self.lowest, self.multiple)), top

    def fault(self, highest: int) -> str | None:
        top = highest if self.highest is None else min(highest, self.highest)
        return _too_high("lowest", self.lowest, highest) or _no_multiple(self.multiple, self.lowest, top)

    def _choices(self, layer: LayerState) -> list[int]:
        """Multiples below the rank now, and staying as it is."""
        low = max(self.lowest, layer.lowest)
        top = min(layer.highest, layer.rank if self.highest is None else self.highest)
        if layer.rank <= low or layer.lowest == layer.highest:  # a layer that has less than the least stays
            return [layer.shrunk(layer.rank)]
        below = [*range(_up_to_multiple(low, self.multiple), min(top, layer.rank - 1) + 1, self.multiple)]
        choices = [*below, layer.rank] if layer.rank <= top else below
        return choices or [max(low, top)]  # a layer's own bounds come first

    def _gains(self, layer: LayerState) -> list[float]:
        if self.score == "energy":
            return _values(layer).double().square().tolist()
        assert layer.scores is not None
        return sorted(layer.scores.tolist(), reverse=True)


@dataclass(frozen=True)
class FinalRanks:
    """Each layer to the final rank that the rank map gives it; the others stay."""

    needs: ClassVar[tuple[str, ...]] = ()
    multiple: ClassVar[int] = 1

    def ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        return {name: layer.shrunk(layer.final_rank or layer.rank) for name, layer in layers.items()}

    def reach(self, low: int, high: int) -> tuple[int, int]:
        return low, high

    def fault(self, highest: int) -> str | None:
        return None


@dataclass(frozen=True)
class GrowTo(_OneRank):
    """At least this rank for all layers; a layer that is already above stays."""

    def ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        return {name: layer.grown(self.rank) for name, layer in layers.items()}

    def reach(self, low: int, high: int) -> tuple[int, int]:
        return max(low, self.rank), max(high, self.rank)

    def fault(self, highest: int) -> str | None:
        if self.rank >= highest:
            return None
        return f"rank must be at least {highest}, the highest at that stage, for a growth, got {self.rank}"


@dataclass(frozen=True)
class GrowBy:
    """``count`` more directions for every layer."""

    count: int
    needs: ClassVar[tuple[str, ...]] = ()
    multiple: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _check_int(self, "count", 1)

    def ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        return {name: layer.grown(layer.rank + self.count) for name, layer in layers.items()}

    def reach(self, low: int, high: int) -> tuple[int, int]:
        return low + self.count, high + self.count

    def fault(self, highest: int) -> str | None:
        return None


@dataclass(frozen=True)
class Exactly(_OneRank):
    """One rank for all layers, up or down."""

    def ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        return {name: max(layer.lowest, min(layer.highest, self.rank)) for name, layer in layers.items()}

    def reach(self, low: int, high: int) -> tuple[int, int]:
        return self.rank, self.rank

    def fault(self, highest: int) -> str | None:
        return None


def _values(layer: LayerState) -> Tensor:
    assert layer.values is not None
    return layer.values


def _up_to_multiple(rank: float, multiple: int) -> int:
    return ceil(rank / multiple - 1e-9) * multiple  # 0.3 * 10 is above 3
