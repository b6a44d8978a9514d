"""Keys that mean layers by their names, as in PEFT: which layers match, why a key means none, and keys of one layer."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from itertools import islice
from typing import Any, TypeVar

from dynrank.errors import ConfigurationError, shown

T = TypeVar("T")

# What PEFT puts before the names of a model that it has wrapped; its own patterns match names without it.
PREFIX = "base_model.model."
# Errors of re.compile.
EXPRESSION_ERRORS = (re.error, RecursionError, OverflowError)
# In the name of a module around a layer.
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
# The number of a block, a whole part of a layer's name.
_IN_BLOCK = re.compile(r"(^|[._])\d+[._]")
# The largest number of faults in one error: the search for the nearest names takes time.
LISTED = 20


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
    faults = [f"{shown(key)}: {fault}" for key in values if (fault := key_fault(key)) is not None]
    if not faults:
        patterns = {key: key for key in values if key not in names}
        winners = first_matches(patterns, (name for name in names if name not in values), kinds=True)
        winners |= {name: name for name in names if name in values}
        unused = (key for key in patterns if key not in winners.values())
        faults = [_unused(key, names, winners) for key in islice(unused, LISTED)]
    if faults:
        raise ConfigurationError("these keys mean no layer:\n  " + "\n  ".join(faults))
    return {name: values[winners[name]] for name in names if name in winners}


def rule_of_each(rules: Iterable[str], names: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """({layer: the key of the first rule that matches it}, a fault for each key that no layer takes its values from).

    Of many faults only the first are returned.
    """
    winners = first_matches({key: key for key in rules}, names, kinds=True)
    unused = (key for key in rules if key not in winners.values())
    return winners, [_unused(key, names, winners) for key in islice(unused, LISTED)]


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


def key_fault(key: Any) -> str | None:
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


def peft_ranks(layers: Mapping[str, tuple[int, float]], rslora: bool = False) -> dict[str, Any]:
    r"""The settings of a PEFT config that give each layer its (rank, alpha).

    Patterns are full, anchored names: PEFT takes the first pattern that matches, and sorts the keys when it saves, so
    patterns must not overlap. PEFT computes scaling as alpha / rank, or with ``rslora`` as alpha / sqrt(rank).

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
        "use_rslora": rslora,
    }


def _anchored(name: str) -> str:
    return "^" + re.escape(name)


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value
