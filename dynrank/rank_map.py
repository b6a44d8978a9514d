"""The rank map: ``rank_pattern`` rules that override rank, alpha and final rank of single LoRA layers."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dynrank.errors import ConfigurationError, Count, Positive, shown, validated

T = TypeVar("T")

# Errors of re.compile.
EXPRESSION_ERRORS = (re.error, RecursionError, OverflowError)
# A name, or its trailing parts, without special characters of regular expressions.
_PLAIN = re.compile(r"[\w.-]+")
# The largest number of faults in one error: the search for the nearest names takes time.
_LISTED = 20


@validated()
class RankRule:
    """The values of the layers that a key matches; None leaves the run's own value.

    Attributes:
        rank: starting rank.
        final_rank: the layer's rank at the end of a schedule.
        alpha: LoRA alpha; the layer's scaling starts at alpha / rank (alpha / sqrt(rank) for rsLoRA).
        highest: the highest rank that a budget may give the layer, instead of the schedule's ``highest``.
        pinned: whether schedules leave the layer's rank unchanged.
    """

    rank: Count | None = None
    final_rank: Count | None = None
    alpha: Positive | None = None
    highest: Count | None = None
    pinned: bool = False

    def __post_init__(self) -> None:
        if self.pinned and (self.final_rank or self.highest):
            raise ConfigurationError("a pinned layer has no final_rank and no highest; remove pinned, or both of these")


def whole_parts(key: str) -> re.Pattern[str]:
    """The expression that PEFT makes of a key of rank_pattern or alpha_pattern and matches with module names."""
    return re.compile(rf"(.*\.)?({key})$")


def first_matches(pattern: Mapping[str, T], names: Iterable[str]) -> dict[str, T]:
    r"""{name: the value of the first key that matches it}, by PEFT's rule; a name that no key matches is left out.

    >>> first_matches({"q_proj": 1, r"layers\.[01]\..*": 2}, ["layers.1.q_proj", "layers.0.eq_proj"])
    {'layers.1.q_proj': 1, 'layers.0.eq_proj': 2}
    """
    expressions = {whole_parts(key): value for key, value in pattern.items()}
    matches = {name: [value for expression, value in expressions.items() if expression.match(name)] for name in names}
    return {name: values[0] for name, values in matches.items() if values}


@dataclass(frozen=True)
class LayerRank:
    """The values of one layer, and ``rule``, the key that set them (None: the run's defaults)."""

    rank: int
    alpha: float
    final_rank: int | None
    highest: int | None
    pinned: bool
    rule: str | None


def peft_ranks(layers: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    r"""The settings of a PEFT config that give each layer its (rank, alpha).

    Patterns are full, anchored names: PEFT takes the first pattern that matches, and sorts the keys when it saves, so
    patterns must not overlap. ``use_rslora`` is false, because only then PEFT computes scaling as alpha / rank.

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


def load_rank_map(path: str | Path) -> dict[str, RankRule]:
    """The rules of an override file (YAML with the one top-level key ``rank_pattern``)."""
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise ConfigurationError(
            f"cannot read the override file {str(path)!r}: {error.strerror}; set rank_map.file"
        ) from None
    # A ValueError means that the file is not text, or that a date in it is impossible.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"rank_map.file must be YAML, got {str(path)!r}: {error!s:.500}") from None
    if not isinstance(data, dict) or set(data) != {"rank_pattern"} or not isinstance(data["rank_pattern"], dict):
        raise ConfigurationError(
            f"an override file must hold the one key rank_pattern with a mapping below it, got {shown(data)}; "
            f"fix {str(path)!r} (rank_map.file)"
        )
    return parse_rank_map(data["rank_pattern"], source=str(path))


def dump_rank_map(rules: Mapping[str, RankRule]) -> str:
    """The text of an override file with these rules, which :func:`load_rank_map` can read."""
    pattern = {
        key: {f.name: getattr(rule, f.name) for f in fields(rule) if getattr(rule, f.name) != f.default}
        for key, rule in rules.items()
    }
    return yaml.safe_dump({"rank_pattern": pattern}, sort_keys=False)


def parse_rank_map(rank_pattern: Mapping[Any, Any], source: str) -> dict[str, RankRule]:
    """Checked rules from plain data: each value is an int (the rank), a mapping of :class:`RankRule` fields, or a rule.

    An error names ``source``, the file or key.
    """
    rules, faults = {}, []
    for key, value in rank_pattern.items():
        try:
            rules[key] = _rule(key, value)
        except ConfigurationError as error:
            faults.append(f"{shown(key)}: {error}")
    if faults:
        raise ConfigurationError(f"faulty rank_pattern in {source} (rank_map):\n  " + "\n  ".join(faults))
    return rules


def _rule(key: Any, value: Any) -> RankRule:
    if not isinstance(key, str):
        raise ConfigurationError(f"a key must be text, got {type(key).__name__}")
    try:
        # "a)(b" compiles only inside PEFT's group, and "(?i)q" only outside of it.
        re.compile(key)
        whole_parts(key)
    except EXPRESSION_ERRORS as error:
        raise ConfigurationError(f"not a regular expression: {error}") from None
    if isinstance(value, RankRule):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return RankRule(rank=value)
    if not isinstance(value, Mapping) or not value:
        names = ", ".join(field.name for field in fields(RankRule))
        raise ConfigurationError(f"must be an int (the rank) or a mapping of {names}, got {shown(value)}")
    return RankRule(**{str(name): entry for name, entry in value.items()})


def resolve_rank_map(
    shapes: Mapping[str, tuple[int, int]],
    rules: Mapping[str, RankRule],
    *,
    rank: int,
    alpha: float,
    capped: Collection[str] = (),
) -> dict[str, LayerRank]:
    """The values of each LoRA layer by the most specific rule that matches it; the order of the rules does not count.

    A key that is the layer's name is the most specific. Next is a plain key (without special characters) that matches
    this layer only, then any other pattern. Two equally specific rules with different values are an error.

    ``shapes`` is {layer: (d_out, d_in)} of every layer that gets LoRA. A layer that no rule sets gets ``rank`` and
    ``alpha``; a layer in ``capped`` gets min(d_in, d_out) if that is less than ``rank``.
    """
    matched = {key: {*filter(whole_parts(key).match, shapes)} for key in rules}
    faults = [_unmatched(key, shapes) for key in islice((key for key in rules if not matched[key]), _LISTED)]
    layers = {}
    for name, (d_out, d_in) in shapes.items():
        specific = {key: _specificity(key, name, matched[key]) for key in rules if name in matched[key]}
        best = [key for key, value in specific.items() if value == max(specific.values())]
        if len({rules[key] for key in best}) > 1:
            faults.append(
                f"{name!r} is set by {' and by '.join(map(repr, best))}, which differ; make one an exact name"
            )
            continue
        key = best[0] if best else None
        rule = rules[key] if key is not None else RankRule()
        default = min(rank, d_out, d_in) if name in capped else rank
        layer = LayerRank(rule.rank or default, rule.alpha or alpha, rule.final_rank, rule.highest, rule.pinned, key)
        faults += [f"{name!r}: {fault}" for fault in _layer_faults(layer, rule, d_out, d_in)]
        layers[name] = layer
    if faults:
        raise ConfigurationError("ranks cannot be resolved:\n  " + "\n  ".join(faults[:_LISTED]))
    return layers


def _layer_faults(layer: LayerRank, rule: RankRule, d_out: int, d_in: int) -> list[str]:
    fix, faults = f"fix the rule {layer.rule!r} (rank_map)", []
    if not 1 <= layer.rank <= min(d_out, d_in):
        said = f"rank must be between 1 and min(d_in, d_out) = {min(d_out, d_in)}, got {layer.rank}"
        faults.append(f"{said}; {'fix lora.rank' if rule.rank is None else fix}")
    if layer.final_rank is not None and layer.final_rank > layer.rank:
        faults.append(f"final_rank must be at most rank = {layer.rank}, got {layer.final_rank}; {fix}")
    return faults


def _unmatched(key: str, names: Mapping[str, Any]) -> str:
    parts = {".".join(name.split(".")[-n:]) for name in names for n in range(1, len(name.split(".")) + 1)}
    near = get_close_matches(_unescaped(key), sorted(parts), n=3, cutoff=0.5)
    return f"{key!r} matches no LoRA layer; nearest: {near or sorted(names)[:3]}"


def _specificity(key: str, name: str, matched: set[str]) -> int:
    """2 for a key that is the layer's name, 1 for a plain one that matches this layer only, 0 for any other pattern."""
    plain = _unescaped(key.removeprefix("^").removesuffix("$"))
    if plain == name:
        return 2
    return 1 if matched == {name} and _PLAIN.fullmatch(plain) else 0


def _unescaped(key: str) -> str:
    """The inverse of re.escape."""
    return re.sub(r"\\(?=\W)", "", key)


class _UniqueKeyLoader(yaml.SafeLoader):
    """A SafeLoader that refuses a repeated key; YAML's own loader would keep the last one without a message."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter((key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for (_, key), times in keys.items():
            if times > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)
