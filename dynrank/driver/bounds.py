"""What the rank of each layer of a run may become: by the rank map of the schedule, or by the layer's own rule."""

from __future__ import annotations

from collections.abc import Mapping
from operator import eq, ge, le

from dynrank.driver.due import is_frozen
from dynrank.errors import ConfigurationError
from dynrank.layers.ranked_layer import RankedLayer
from dynrank.patterns import rule_of_each
from dynrank.rank_map import RankBounds

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


def check_bounds(
    layers: Mapping[str, RankedLayer],
    bounds: Mapping[str, RankBounds],
    ends: Mapping[str, int],
) -> None:
    """Refuse bounds of layers that the schedule does not reach.

    ``ends`` are the ranks that the schedule leads to. They are within the bounds whatever the data, unless a layer is
    frozen, or no stage lowers or raises its rank.
    """
    faults: dict[str, list[str]] = {}
    for name, own in bounds.items():
        why = "it is frozen" if is_frozen(layers[name]) else None
        for fault in _unreached(own, ends[name], why):
            faults.setdefault(fault, []).append(name)
    lines = [f"{n[0]!r}{f' and {len(n) - 1} more' if len(n) > 1 else ''}: {fault}" for fault, n in faults.items()]
    if lines:
        raise ConfigurationError("rank_map does not fit the schedule:\n  " + "\n  ".join(lines[:_LISTED]), "rank_map")


def _unreached(own: RankBounds, end: int, why: str | None) -> list[str]:
    """Which of these bounds a layer that ends at rank ``end`` does not keep; ``why``, if it is not the schedule."""
    faults = []
    for bound, allows in (("final_rank", eq), ("lowest", le), ("highest", ge)):
        value = getattr(own, bound)
        if value is not None and not allows(value, end):
            side, verb, side_of_end = ("above", "raises", "most") if value > end else ("below", "lowers", "least")
            reason = why or f"no stage {verb} it there"
            faults.append(f"{bound}={value} is {side} its rank {end}, and {reason}; set it to at {side_of_end} {end}")
    return faults
