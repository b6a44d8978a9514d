"""What the rank of each layer of a run may become: by the rank map of the schedule, or by the layer's own rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import eq, ge, le

from dynrank.errors import ConfigurationError
from dynrank.layers.base import RankedLayer
from dynrank.rank_map import RankBounds, rule_of_each
from dynrank.schedules import Stage
from dynrank.targets import Budget

# The largest number of faults in one error.
_LISTED = 20


def bounds_of(layers: Mapping[str, RankedLayer], rules: Mapping[str, RankBounds]) -> dict[str, RankBounds]:
    """{layer: what its rank may become}.

    The first of ``rules`` that matches a layer decides; for a layer that none matches, its own rule, which
    :func:`dynrank.add_lora` gave it.

    Raises:
        ConfigurationError: if a rule matches no layer, or only layers of earlier rules.
    """
    keys, faults = rule_of_each(rules, layers)
    if faults:
        raise ConfigurationError("rank_map does not fit the model:\n  " + "\n  ".join(faults), "rank_map")
    return {name: rules[keys[name]] if name in keys else layer.bounds for name, layer in layers.items()}


def keeps_rank(layer: RankedLayer, bounds: RankBounds) -> bool:
    """Whether schedules keep the layer's rank: it is pinned, or frozen (then a cut may still balance it).

    A frozen layer has no importance, and a pool would cut off what it learned earlier.
    """
    return bounds.pinned or is_frozen(layer)


def is_frozen(layer: RankedLayer) -> bool:
    return not (layer.lora_A.requires_grad or layer.lora_B.requires_grad)


def faults_of_budget(stage: Stage, bounds: Mapping[str, RankBounds]) -> list[str]:
    """Why the bounds of a budget and those of layers, ``bounds``, leave no rank to some of these."""
    if not isinstance(stage.to, Budget):
        return []
    faults: dict[str, list[str]] = {}
    for name, own in bounds.items():
        if own.highest is not None and own.highest < stage.to.lowest:
            fault = f"highest={own.highest} in rank_map is below lowest={stage.to.lowest} of the budget"
            faults.setdefault(fault, []).append(name)
        if own.lowest is not None and own.lowest > (stage.to.highest or own.lowest):
            fault = f"lowest={own.lowest} in rank_map is above highest={stage.to.highest} of the budget"
            faults.setdefault(fault, []).append(name)
    return _lines(faults)


def check_ends(layers: Mapping[str, RankedLayer], bounds: Mapping[str, RankBounds], ends: Mapping[str, int]) -> None:
    """Refuse bounds that layers do not come into; ``ends`` are the ranks that a schedule leads to.

    They come into them whatever the data, unless they are frozen, or no stage lowers or raises their rank.
    """
    faults: dict[str, list[str]] = {}
    for name, own in bounds.items():
        end = ends[name]
        for bound, allows in (("final_rank", eq), ("lowest", le), ("highest", ge)):
            value = getattr(own, bound)
            if value is None or allows(value, end):
                continue
            side, verb = ("above", "raises") if value > end else ("below", "lowers")
            why = "it is frozen" if is_frozen(layers[name]) else f"no stage {verb} it there"
            faults.setdefault(f"{bound}={value} is {side} its rank {end}, and {why}", []).append(name)
    if faults:
        lines = "\n  ".join(_lines(faults)[:_LISTED])
        raise ConfigurationError(f"rank_map does not fit the schedule:\n  {lines}", "rank_map")


def _lines(faults: Mapping[str, Sequence[str]]) -> list[str]:
    """A line for each fault, with the first of its layers."""
    return [
        f"{names[0]!r}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {fault}"
        for fault, names in faults.items()
    ]
