"""What an event, a history and the line before training say: short, whatever the model."""

import io
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import dynrank
from dynrank.change.reports import LayerReport
from dynrank.driver.driver import RankDriver
from dynrank.driver.event import Measured, RankEvent
from dynrank.driver.slot_notice import highest_ranks, slot_notice
from dynrank.schedules import Stage, after_convergence, auto, early_budget, energy, fixed, milestones
from dynrank.targets import GrowTo, LayerState, Rank
from dynrank.triggers import At

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj")
NAMES = [f"model.layers.{block}.{kind}" for block in range(28) for kind in KINDS]
REPORTS = tuple(LayerReport(name, 16, 4, 0.9, 0.1, (16.0, 15.0) * 8, 64, 0.01, 0.001) for name in NAMES)
MEASURED = Measured("eval_loss", 1.5, 1.75)
CUT = RankEvent(50, "fraction 0.5", REPORTS, measured=MEASURED, lr_factor=2.0655)
UNDONE = RankEvent(80, f"undone: {MEASURED} (fraction 0.8)", REPORTS, undone=True, measured=MEASURED)
SEARCHED = RankEvent(99, f"fraction 1: 20 of 40 directions, {MEASURED}", REPORTS, measured=MEASURED)


def text(table):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return " ".join(console.export_text().split())


def test_a_cut_says_what_it_costs_and_what_becomes_of_the_rate():
    said = "rank change at step 50: fraction 0.5; eval_loss 1.5 → 1.75 by the cut; adapter's rate × 2.07 from here"
    assert str(CUT) == f"{said} (rank 16 → rank 4 in {len(CUT.layers)} layers)"
    assert said in text(CUT.table())
    assert "rate" not in str(replace(CUT, lr_factor=1.0))


@pytest.mark.parametrize("event", [UNDONE, SEARCHED], ids=["undone", "searched"])
def test_what_the_reason_says_already_is_not_said_again(event):
    assert str(event).count("eval_loss 1.5 → 1.75") == 1
    assert str(event).count("undone") == (1 if event.undone else 0)
    assert event.reason_and_cost == event.reason


def test_in_a_session_a_run_is_a_short_table_that_counts_what_was_saved():
    driver = RankDriver(4)
    assert (driver.history, repr(driver.history)) == ([], "[]")
    driver.progress.history = [CUT, UNDONE]
    shown = text(driver.history.table())
    saved = sum(12 * layer.params_per_rank for layer in CUT.layers)
    assert f"│ × 2.07 │ {saved:,} │" in shown
    assert "16 → 4, undone │ × 1 │ 0 │" in shown
    for thing in (driver.history, CUT, UNDONE):
        assert len(repr(thing).splitlines()) < 20, thing
    state = LayerState(4, values=torch.tensor([16.0, 15.0]))
    assert all("16.0, 15.0" not in repr(thing) for thing in (driver.history, CUT, CUT.layers[0], state))


# What a server will reserve


def model(**rank_map):
    blocks = torch.nn.ModuleDict({kind: torch.nn.Linear(24, 24) for kind in KINDS})
    return dynrank.add_lora(blocks, rank=16, alpha=16, rank_map=rank_map)


LIMITED = "up to 16; schedule.highest=8 limits it"


@pytest.mark.parametrize(
    ("schedule", "rank_map", "said"),
    [
        *((schedule, {}, LIMITED) for schedule in (early_budget(4), auto(), after_convergence(4))),
        (early_budget(8) + early_budget(4, at=0.6), {}, LIMITED),
        ([*early_budget(2), Stage(At(fraction=0.5), GrowTo(4))], {}, LIMITED),
        # No limit of the schedule lowers a pinned layer; one of the rank map does not raise it. Energy has none.
        (early_budget(2), {"q_proj": {"pinned": True}}, "up to 16"),
        (early_budget(4, lowest=3), {"q_proj": {"highest": 16}}, LIMITED),
        (energy(0.9), {}, "up to 16"),
        # A slot of the mean rank is as large.
        *((early_budget(*ranks, **options), {}, None) for ranks, options in (([12], {}), ([4], {"highest": 8}))),
        (early_budget(4), dict.fromkeys(KINDS, {"highest": 8}), None),
        # Uniform ranks, or ones that are known.
        (after_convergence(4, shared=False), {}, None),
        (milestones([8, 4], at=[0.5, 0.75]), {}, None),
        ([Stage(At(fraction=0.5), Rank({"attention": 2}))], {}, None),
        ([*early_budget(4), Stage(At(fraction=0.5), Rank(4))], {}, None),
        (fixed(), {}, None),
    ],
)
def test_before_training_a_line_says_what_a_server_may_reserve_and_what_limits_it(schedule, rank_map, said):
    made = model(**rank_map)
    notice = slot_notice(made, schedule)
    named = slot_notice(made, schedule, name="schedule.highest")
    assert named == (said and f"a server reserves the highest rank of the adapter in every layer, {said}")
    if said == LIMITED:
        line = named.partition(";")[0]
        assert slot_notice(made, schedule, name=None) == line
        assert re.fullmatch(rf"{line}; highest=8 in the schedule limits it, as early_budget\(\d, highest=8\)", notice)


@pytest.mark.parametrize("skewed", KINDS)
@pytest.mark.parametrize("schedule", [early_budget(4, at=0.5), early_budget(4, at=0.5, highest=8), auto(at=0.5)])
def test_no_layer_ends_above_what_was_said_and_one_can_reach_it(schedule, skewed):
    highest = highest_ranks(model(), schedule)
    ranks = schedule[0].to.ranks({kind: LayerState(16, 24, 24, importance=float(kind == skewed)) for kind in KINDS})
    assert all(ranks[name] <= highest[name] for name in KINDS)
    # The pool of 64 directions has enough for one layer.
    assert ranks[skewed] == min(13, highest[skewed])
