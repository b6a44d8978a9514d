"""The rank map: rules by pattern that set rank and alpha of single LoRA layers, and what their rank may become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dynrank.errors import ConfigurationError, Count, Positive, checked, shown
from dynrank.patterns import LISTED, key_fault, rule_of_each

# What sets a value of single layers in PEFT's LoraConfig.
_OF_PEFT = {"rank": "rank_pattern", "alpha": "alpha_pattern"}

# A rank map as users write it: the path of its file, or {pattern or word: rule}.
RankMap: TypeAlias = str | Path | Mapping[str, Any]


@checked(kw_only=True)
class RankBounds:
    """What the rank of a layer may become by a schedule; None leaves it to the schedule.

    Attributes:
        pinned: whether schedules leave the layer's rank unchanged.
        highest: the highest rank that a change may leave the layer. A budget may have a ``highest`` of its own; the
            lower one holds.
        lowest: the lowest rank that a change may give the layer. A budget may have a ``lowest`` of its own; the higher
            one holds.
        final_rank: the layer's rank after the last stage; until then no stage shrinks it below that.

    Raises:
        ConfigurationError: if values contradict each other.

    >>> print(RankBounds(lowest=4, highest=16), RankBounds(highest=8), RankBounds(pinned=True), sep=", ")
    4 to 16, at most 8, pinned
    """

    pinned: bool = False
    highest: Count | None = None
    lowest: Count | None = None
    final_rank: Count | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("highest", "lowest", "final_rank")}
        others = [name for name, value in given.items() if value is not None]
        if self.pinned and others:
            raise ConfigurationError(
                f"a pinned layer keeps its rank and has no {' and no '.join(others)}; remove pinned, or {others[0]}",
                *("pinned", *others),
            )
        for low, high in (("lowest", "highest"), ("lowest", "final_rank"), ("final_rank", "highest")):
            least = given[low]
            most = given[high]
            if least is not None and most is not None and least > most:
                raise ConfigurationError(f"{low} must be at most {high} = {most}, got {least}", low, high)

    def __str__(self) -> str:
        """A few words for tables; empty if the schedule alone decides."""
        if self.pinned:
            return "pinned"
        if self.highest is None:
            return "" if self.lowest is None else f"at least {self.lowest}"
        return f"at most {self.highest}" if self.lowest is None else f"{self.lowest} to {self.highest}"


# The names of the bounds, in the order in which pages and errors have them.
BOUNDS = tuple(part.name for part in fields(RankBounds))
# Of a layer that the schedule alone decides about.
FREE = RankBounds()


@checked(kw_only=True)
class RankRule(RankBounds):
    """The values of the layers that a key of add_lora's rank map matches; None leaves the run's own value.

    Attributes:
        rank: starting rank.
        alpha: LoRA alpha; the layer's scaling starts at alpha / rank (alpha / sqrt(rank) for rsLoRA). None: as much
            as gives the layer the scaling of the others.
    """

    rank: Count | None = None
    alpha: Positive | None = None

    @property
    def bounds(self) -> RankBounds:
        """What the rule says about changes of the rank."""
        return RankBounds(**{name: getattr(self, name) for name in BOUNDS})


R = TypeVar("R", bound=RankBounds)


@dataclass(frozen=True)
class LayerValues:
    """The values of one layer, and ``rule``, the key that set them (None: the run's defaults)."""

    rank: int
    alpha: float
    bounds: RankBounds
    rule: str | None


def read_rank_map(rank_map: RankMap | None, kind: type[R]) -> dict[str, R]:
    """The checked rules of a rank map as users write it, each of class ``kind``; None: no rules.

    A rule of add_lora is a :class:`RankRule`, one of a schedule is :class:`RankBounds`.
    """
    if isinstance(rank_map, str | Path):
        return load_rank_map(rank_map, kind)
    if rank_map is not None and not isinstance(rank_map, Mapping):
        raise ConfigurationError(
            f"rank_map must be the path of a file or a mapping {{pattern: rule}}, got {shown(rank_map)}", "rank_map"
        )
    return parse_rank_map(rank_map or {}, "rank_map", kind)


def load_rank_map(path: str | Path, kind: type[R] = RankRule) -> dict[str, R]:  # type: ignore[assignment]
    """The rules of an override file (YAML with the one top-level key ``rank_pattern``), each of class ``kind``."""
    try:
        data = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    # A ValueError means that the file is not text.
    except (OSError, YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"the override file {str(path)!r} cannot be read as YAML: {error!s:.500}", "path"
        ) from None
    if not isinstance(data, dict) or set(data) != {"rank_pattern"} or not isinstance(data["rank_pattern"], dict):
        raise ConfigurationError(
            f"an override file must hold the one key rank_pattern with a mapping below it, got {shown(data)}; "
            f"fix {str(path)!r}",
            "path",
        )
    return parse_rank_map(data["rank_pattern"], str(path), kind)


def parse_rank_map(
    rank_pattern: Mapping[Any, Any],
    source: str,
    kind: type[R] = RankRule,  # type: ignore[assignment]
) -> dict[str, R]:
    """Checked rules from plain data: each value is a mapping of the fields of ``kind``, or a rule of this class.

    In add_lora's rank map (:class:`RankRule`) it may also be an int, the rank. An error names ``source``, the file or
    argument.
    """
    rules = {}
    faults = []
    for key, value in rank_pattern.items():
        try:
            rules[key] = _rule(key, value, kind)
        except ConfigurationError as error:
            faults.append(f"{shown(key)}: {error}")
    if faults:
        raise ConfigurationError(f"faulty rank_pattern in {source}:\n  " + "\n  ".join(faults), "rank_map")
    return rules


def _rule(key: Any, value: Any, kind: type[R]) -> R:
    fault = key_fault(key)
    if fault is not None:
        raise ConfigurationError(fault)
    if isinstance(value, RankBounds):
        value = {part.name: entry for part in fields(value) if (entry := getattr(value, part.name)) is not None}
    # A rule of a schedule has no starting rank.
    has_start = issubclass(kind, RankRule)
    if isinstance(value, int) and not isinstance(value, bool):
        if not has_start:
            raise ConfigurationError(
                f"an int is the starting rank in a rank map of add_lora, and here ranks change: write "
                f"{{final_rank: {value}}}, the rank after the last stage, or {{highest: {value}}}"
            )
        value = {"rank": value}
    if not isinstance(value, Mapping) or not value:
        names = ", ".join(part.name for part in fields(kind))
        what = "an int (the rank) or a mapping" if has_start else "a mapping"
        raise ConfigurationError(f"must be {what} of {names}, got {shown(value)}")
    given = [name for name in _OF_PEFT if name in value]
    if given and not has_start:
        raise ConfigurationError(
            f"{' and '.join(given)} of a layer {'are' if len(given) > 1 else 'is'} set where LoRA is added: by "
            f"{' and '.join(_OF_PEFT[name] for name in given)} of PEFT's LoraConfig, or by rank_map of add_lora; a "
            f"rule here has {', '.join(BOUNDS)}"
        )
    return kind(**{str(name): entry for name, entry in value.items()})


def resolve_rank_map(
    shapes: Mapping[str, tuple[int, int]],
    rules: Mapping[str, RankRule],
    *,
    rank: int,
    alpha: float,
    rslora: bool = False,
    capped: bool = False,
) -> dict[str, LayerValues]:
    """The values of each LoRA layer by the first rule that matches it, as in PEFT; later rules change nothing there.

    ``shapes`` is {layer: (d_out, d_in)} of every layer that gets LoRA. A layer that no rule sets gets ``rank`` and
    ``alpha``; if ``capped``, it gets min(d_in, d_out) if that is less than ``rank``. Where no rule sets alpha, it is as
    much as gives another rank the scaling ``alpha / rank``, or with ``rslora`` ``alpha / sqrt(rank)``.

    Raises:
        ConfigurationError: if a rule matches no layer or only layers of earlier rules, or a rank does not fit a layer.
    """
    winners, faults = rule_of_each(rules, shapes)
    layers = {}
    for name, (d_out, d_in) in shapes.items():
        key = winners.get(name)
        rule = rules[key] if key is not None else RankRule()
        default = min(rank, d_out, d_in) if capped else rank
        own_rank = rule.rank or default
        same_scaling = alpha * (own_rank / rank) ** (0.5 if rslora else 1)
        layers[name] = layer = LayerValues(own_rank, rule.alpha or same_scaling, rule.bounds, key)
        most = min(d_out, d_in)
        if layer.rank > most:
            fault = f"{name!r}: rank must be between 1 and min(d_in, d_out) = {most}, got {layer.rank}"
            lower = "lower rank, or set the rank of this layer in rank_map"
            faults.append(f"{fault}; {lower if rule.rank is None else f'fix the rule {key!r} of rank_map'}")
    if faults:
        raise ConfigurationError("ranks cannot be resolved:\n  " + "\n  ".join(faults[:LISTED]), "rank_map", "rank")
    return layers
