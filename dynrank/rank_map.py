"""The rank map: rules by pattern that set rank and alpha of single LoRA layers, and what their rank may become."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dynrank.errors import ConfigurationError, Count, Positive, checked, shown

T = TypeVar("T")

# What PEFT puts before the names of a model that it has wrapped; its own patterns match names without it.
PREFIX = "base_model.model."
# Errors of re.compile.
EXPRESSION_ERRORS = (re.error, RecursionError, OverflowError)
# In the name of a module around a layer.
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
# What sets a value of single layers in PEFT's LoraConfig.
_OF_PEFT = {"rank": "rank_pattern", "alpha": "alpha_pattern"}
# The number of a block, a whole part of a layer's name.
_IN_BLOCK = re.compile(r"(^|[._])\d+[._]")
# The largest number of faults in one error: the search for the nearest names takes time.
_LISTED = 20


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
        alpha: LoRA alpha; the layer's scaling starts at alpha / rank (alpha / sqrt(rank) for rsLoRA).
    """

    rank: Count | None = None
    alpha: Positive | None = None

    @property
    def bounds(self) -> RankBounds:
        """What the rule says about changes of the rank."""
        return RankBounds(**{name: getattr(self, name) for name in BOUNDS})


R = TypeVar("R", bound=RankBounds)


def whole_parts(key: str) -> re.Pattern[str]:
    """The expression that PEFT makes of a key of rank_pattern or alpha_pattern and matches with module names."""
    return re.compile(rf"(.*\.)?({key})$")


def kind_of(name: str) -> str | None:
    """The kind of a layer that a key can name: "attention", "mlp" or none.

    "attention" is every layer inside a module with attn or attention in its name, "mlp" every other layer of a numbered
    block.

    >>> kind_of("model.layers.0.self_attn.q_proj"), kind_of("model.layers.0.mlp.up_proj"), kind_of("lm_head")
    ('attention', 'mlp', None)
    """
    if _ATTENTION.search(name.rpartition(".")[0]):
        return "attention"
    return "mlp" if _IN_BLOCK.search(name) else None


def first_matches(pattern: Mapping[str, T], names: Iterable[str], *, kinds: bool = False) -> dict[str, T]:
    r"""{name: the value of the first key that matches it}, by PEFT's rule; a name that no key matches is left out.

    With ``kinds`` a key may also be the kind of a layer (:func:`kind_of`).

    >>> first_matches({"q_proj": 1, r"layers\.[01]\..*": 2}, ["layers.1.q_proj", "layers.0.eq_proj"])
    {'layers.1.q_proj': 1, 'layers.0.eq_proj': 2}
    """
    expressions = [(key, whole_parts(key), value) for key, value in pattern.items()]
    matches = {}
    for name in names:
        kind = kind_of(name) if kinds else None
        inside = name.rpartition(PREFIX)[2]
        for key, expression, value in expressions:
            if key == kind or expression.match(inside) or expression.match(name):
                matches[name] = value
                break
    return matches


def by_layer(values: Mapping[str, T], names: Collection[str]) -> dict[str, T]:
    """{layer: its value} for the layers of ``names`` that a key of ``values`` means.

    A key is the whole name of a layer, which then means this layer alone and goes before all others; or a pattern as in
    a rank map, or "attention" or "mlp" (:func:`kind_of`), of which the first that matches a layer wins.

    Raises:
        ConfigurationError: if a key is no regular expression, or matches no layer, or only layers of other keys.

    >>> layers = ["h.0.attn.q", "h.0.attn.v", "h.0.mlp.up", "h.1.mlp.up", "head"]
    >>> by_layer({"attention": 8, r"0.*up": 4, "mlp": 2, "h.0.attn.v": 6}, layers)
    {'h.0.attn.q': 8, 'h.0.attn.v': 6, 'h.0.mlp.up': 4, 'h.1.mlp.up': 2}
    """
    faults = [f"{shown(key)}: {fault}" for key in values if (fault := _key_fault(key)) is not None]
    if not faults:
        patterns = {key: key for key in values if key not in names}
        winners = first_matches(patterns, (name for name in names if name not in values), kinds=True)
        winners |= {name: name for name in names if name in values}
        unused = (key for key in patterns if key not in winners.values())
        faults = [_unused(key, names, winners) for key in islice(unused, _LISTED)]
    if faults:
        raise ConfigurationError("these keys mean no layer:\n  " + "\n  ".join(faults))
    return {name: values[winners[name]] for name in names if name in winners}


@dataclass(frozen=True)
class LayerValues:
    """The values of one layer, and ``rule``, the key that set them (None: the run's defaults)."""

    rank: int
    alpha: float
    bounds: RankBounds
    rule: str | None


def peft_ranks(layers: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    r"""The settings of a PEFT config that give each layer its (rank, alpha).

    Patterns are full, anchored names: PEFT takes the first pattern that matches, and sorts the keys when it saves, so
    patterns must not overlap. ``use_rslora`` is False, because only then PEFT computes scaling as alpha / rank.

    >>> peft_ranks({"q": (4, 8.0), "v": (2, 4.0)})["rank_pattern"]
    {'^v': 2}
    """
    rank = max(rank for rank, _ in layers.values())
    alpha = max(alpha for r, alpha in layers.values() if r == rank)
    return {
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": {_anchored(name): r for name, (r, _) in layers.items() if r != rank},
        "alpha_pattern": {_anchored(name): _number(a) for name, (_, a) in layers.items() if a != alpha},
        "use_rslora": False,
    }


def _anchored(name: str) -> str:
    return "^" + re.escape(name)


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value


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


def _key_fault(key: Any) -> str | None:
    """Why ``key`` cannot match layers; None if it can."""
    if not isinstance(key, str):
        return f"a key must be text, got {type(key).__name__}"
    try:
        # "a)(b" compiles only inside PEFT's group, and "(?i)q" only outside of it.
        re.compile(key)
        whole_parts(key)
    except EXPRESSION_ERRORS as error:
        return f"not a regular expression: {error}"
    return None


def _rule(key: Any, value: Any, kind: type[R]) -> R:
    fault = _key_fault(key)
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
    capped: bool = False,
) -> dict[str, LayerValues]:
    """The values of each LoRA layer by the first rule that matches it, as in PEFT; later rules change nothing there.

    ``shapes`` is {layer: (d_out, d_in)} of every layer that gets LoRA. A layer that no rule sets gets ``rank`` and
    ``alpha``; if ``capped``, it gets min(d_in, d_out) if that is less than ``rank``.

    Raises:
        ConfigurationError: if a rule matches no layer or only layers of earlier rules, or a rank does not fit a layer.
    """
    winners, faults = rule_of_each(rules, shapes)
    layers = {}
    for name, (d_out, d_in) in shapes.items():
        key = winners.get(name)
        rule = rules[key] if key is not None else RankRule()
        default = min(rank, d_out, d_in) if capped else rank
        layers[name] = layer = LayerValues(rule.rank or default, rule.alpha or alpha, rule.bounds, key)
        most = min(d_out, d_in)
        if layer.rank > most:
            said = f"{name!r}: rank must be between 1 and min(d_in, d_out) = {most}, got {layer.rank}"
            lower = "lower rank, or set the rank of this layer in rank_map"
            faults.append(f"{said}; {lower if rule.rank is None else f'fix the rule {key!r} of rank_map'}")
    if faults:
        raise ConfigurationError("ranks cannot be resolved:\n  " + "\n  ".join(faults[:_LISTED]), "rank_map", "rank")
    return layers


def rule_of_each(rules: Iterable[str], names: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """({layer: the key of the first rule that matches it}, a fault for each key that no layer takes its values from).

    Of many faults only the first are returned.
    """
    winners = first_matches({key: key for key in rules}, names, kinds=True)
    unused = (key for key in rules if key not in winners.values())
    return winners, [_unused(key, names, winners) for key in islice(unused, _LISTED)]


def _unused(key: str, names: Collection[str], winners: Mapping[str, str]) -> str:
    """Why no layer takes its values from the rule ``key``; ``winners`` is {layer: the first key that matches it}."""
    hiding = dict.fromkeys(winners[name] for name in first_matches({key: key}, names, kinds=True))
    if hiding:
        by = " and ".join(map(repr, islice(hiding, 3)))
        return (
            f"{key!r} is hidden by {by}: the first pattern that matches a layer wins; move {key!r} before, or remove it"
        )
    parts = {".".join(name.split(".")[-n:]) for name in names for n in range(1, len(name.split(".")) + 1)}
    # The inverse of re.escape.
    plain = re.sub(r"\\(?=\W)", "", key)
    near = get_close_matches(plain, sorted(parts), n=3, cutoff=0.5)
    return f"{key!r} matches no LoRA layer; nearest: {near or sorted(names)[:3]}"
