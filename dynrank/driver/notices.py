"""What is known of a run before its first step: how far ranks can go, a server's slot, scalings that differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil

from torch import nn

from dynrank.driver.bounds import BoundLayers
from dynrank.driver.checks import NO_RULES, depends_on_data, final_ranks
from dynrank.output.ranks import ranks, scalings_notice
from dynrank.output.slots import average, slot_rank
from dynrank.rank_map import RankBounds
from dynrank.schedules import Stage
from dynrank.targets import Budget, Energy


def start_notices(model: nn.Module, schedule: Sequence[Stage], rules: Mapping[str, RankBounds] = NO_RULES) -> list[str]:
    """What to know before the first step, a line each: of a server's slot, and of scalings that differ."""
    return [*filter(None, (slot_notice(model, schedule, rules), scalings_notice(ranks(model))))]


def slot_notice(model: nn.Module, schedule: Sequence[Stage], rules: Mapping[str, RankBounds] = NO_RULES) -> str | None:
    """A line about a server's slot for the adapter at the end; None: the mean rank needs as large a slot.

    Args:
        model: the model, before the first stage of ``schedule``.
        schedule: the stages to come.
        rules: those of the schedule's rank map.

    >>> import dynrank
    >>> from dynrank.schedules import early_budget
    >>> layers = [nn.Linear(64, 64) for _ in range(4)]
    >>> line, cure = slot_notice(dynrank.add_lora(nn.Sequential(*layers), rank=16), early_budget(4)).split("; ")
    >>> line
    'a server reserves the highest rank of the adapter in every layer, up to 16'
    >>> cure
    'for a slot of 8 write early_budget(8, highest=8)'
    """
    # Only such stages leave it to the run which layers get more than others.
    if not depends_on_data(schedule):
        return None
    top = max(highest for _, highest in rank_spans(model, schedule, rules).values())
    slot = slot_rank(ceil(average(final_ranks(model, schedule, rules))))
    if top <= slot:
        return None
    line = f"a server reserves the highest rank of the adapter in every layer, up to {top}"
    return f"{line}; for a slot of {slot} write early_budget({slot}, highest={slot})"


def rank_spans(
    model: nn.Module, schedule: Sequence[Stage], rules: Mapping[str, RankBounds] = NO_RULES
) -> dict[str, tuple[int, int]]:
    """{layer: the lowest and the highest rank that it can have after the last stage}, whatever the data are."""
    layers = BoundLayers.of(model, rules)
    low = high = layers.ranks
    for number, stage in enumerate(schedule, 1):
        to = stage.to
        least, most = (layers.expected_states(ranks, last=number == len(schedule)) for ranks in (low, high))
        if isinstance(to, Budget):
            low, high = to.lowest_ranks(least), to.highest_ranks(most)
        elif not to.needs:
            low, high = (layers.ranks_by(stage, states) for states in (least, most))
        else:
            end = to.lowest if isinstance(to, Energy) else 1
            low = {name: state.shrunk(end) for name, state in least.items()}
    return {name: (low[name], high[name]) for name in layers.layers}


def pool_at_end(model: nn.Module, schedule: Sequence[Stage], rules: Mapping[str, RankBounds] = NO_RULES) -> int | None:
    """How many parameters all layers may have together after the last stage; None if that is no budget."""
    if not schedule or not isinstance(schedule[-1].to, Budget):
        return None
    ranks = final_ranks(model, schedule[:-1], rules)
    return schedule[-1].to.pool(BoundLayers.of(model, rules).expected_states(ranks, last=True))
