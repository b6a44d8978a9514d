"""What an event and the line before training say: short, whatever the model."""

from dataclasses import replace

import pytest
import torch

import dynrank
from dynrank.change.reports import LayerReport
from dynrank.driver.event import Measured, RankEvent
from dynrank.driver.notices import rank_spans, start_notices
from dynrank.schedules import Stage, after_convergence, auto, early_budget, energy, fixed, milestones
from dynrank.targets import GrowTo, LayerState, Rank
from dynrank.triggers import At

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj")
REPORTS = tuple(LayerReport(f"{kind}.{n}", 16, 4, 0.9, 0.1, (16.0, 15.0), 64) for n in range(28) for kind in KINDS)
CUT = RankEvent(50, "fraction 0.5", REPORTS, measured=Measured("eval_loss", 1.5, 1.75), lr_factor=2.0655)


@pytest.mark.parametrize(("undone", "before"), [(False, ""), (True, "undone: ")])
def test_a_change_says_in_one_line_what_it_costs_and_what_becomes_of_the_rate(undone, before):
    event = replace(CUT, undone=undone)
    cost = "eval_loss 1.5 → 1.75 by the cut"
    said = f"rank change at step 50: {before}fraction 0.5; {cost}; adapter's rate × 2.07 from here"
    assert str(event) == repr(event) == f"{said} (rank 16 → rank 4 in 112 layers)"
    assert said == event.table().title
    assert "rate" not in str(replace(event, lr_factor=1.0))


# What a server will reserve


def model(**rank_map):
    blocks = torch.nn.ModuleDict({kind: torch.nn.Linear(24, 24) for kind in KINDS})
    return dynrank.add_lora(blocks, rank=16, alpha=16, rank_map=rank_map)


@pytest.mark.parametrize(
    ("schedule", "rank_map", "is_said"),
    [
        *((schedule, {}, True) for schedule in (early_budget(4), auto(), energy(0.9))),
        ([*early_budget(2), Stage(At(fraction=0.5), GrowTo(4))], {}, True),
        (early_budget(2), {"q_proj": {"pinned": True}}, True),
        # A slot of the mean rank is as large.
        *((early_budget(*ranks, **options), {}, False) for ranks, options in (([12], {}), ([4], {"highest": 8}))),
        (early_budget(4), dict.fromkeys(KINDS, {"highest": 8}), False),
        # Uniform ranks, or ones that are known.
        (after_convergence(4, shared=False), {}, False),
        (milestones([8, 4], at=[0.5, 0.75]), {}, False),
        ([*early_budget(4), Stage(At(fraction=0.5), Rank(4))], {}, False),
        (fixed(), {}, False),
    ],
)
def test_before_training_a_line_says_what_a_server_may_reserve(schedule, rank_map, is_said):
    notices = start_notices(model(**rank_map), schedule)
    line = "a server reserves the highest rank of the adapter in every layer, up to 16; for a slot of "
    assert [notice.startswith(line) for notice in notices] == [True] * is_said


def test_before_training_a_line_says_where_scalings_differ():
    (line,) = start_notices(model(k_proj={"rank": 4, "alpha": 32}), fixed())
    assert line.startswith("layers differ in their scaling: 1 in 3 layers")
    assert line.endswith("8 in 1 (k_proj)")


@pytest.mark.parametrize("schedule", [early_budget(4, at=0.5), early_budget(4, at=0.5, highest=8), auto(at=0.5)])
def test_no_layer_ends_above_what_was_said_and_one_can_reach_it(schedule):
    spans = rank_spans(model(), schedule)
    layers = {kind: LayerState(16, 24, 24, importance=float(kind == "k_proj")) for kind in KINDS}
    ranks = schedule[0].to.ranks(layers)
    assert all(ranks[name] <= spans[name][1] for name in KINDS)
    # The pool of 64 directions has enough for one layer.
    assert ranks["k_proj"] == min(13, spans["k_proj"][1])
