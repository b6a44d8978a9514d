"""What a schedule and its rank map mean for the layers of a model, where ranks may end, and what does not fit."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from trained import drive, updated

import dynrank
from dynrank.driver.bounds import BoundLayers
from dynrank.driver.checks import NO_RULES, check_model, final_ranks
from dynrank.driver.due import DueStage
from dynrank.driver.training import Training
from dynrank.errors import ConfigurationError
from dynrank.rank_map import RankBounds, read_rank_map
from dynrank.schedules import (
    Stage,
    after_convergence,
    auto,
    early_budget,
    energy,
    fixed,
    grow,
    rebalance,
)
from dynrank.targets import Budget, Energy, GrowTo, Rank, Target, Towards
from dynrank.triggers import At, Run

RUN = Run(total_steps=10)


def to(*targets):
    return [Stage(At(step=1), target) for target in targets]


def rules_of(**rank_map):
    return read_rank_map(rank_map, RankBounds)


def due(model, target, rules):
    (stage,) = to(target)
    return DueStage(Training(model, []), stage, "", BoundLayers.of(model, rules).bounds, {}, last=True)


def refusal(model, schedule, rules=NO_RULES):
    with pytest.raises(ConfigurationError) as caught:
        check_model(model, schedule, RUN, rules)
    return f"{caught.value} {caught.value.arguments}"


# Where the schedule leads the layers of a small model

# Parameters of a direction in each layer, and of all.
SIZES = (40, 36, 52)
COST = 8 * sum(SIZES)


def small(rank=8, **rank_map):
    """Three layers, (d_out, d_in) = (24, 16), (12, 24) and (40, 12), with the rules ``of_0``, ``of_1``, ``of_2``."""
    net = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 12), nn.Linear(12, 40))
    rules = {key.removeprefix("of_"): rule for key, rule in rank_map.items()}
    return dynrank.add_lora(net, rank=rank, alpha=rank, rank_map=rules, target_modules=["0", "1", "2"])


class Double(Target):
    """Of a user's."""

    def ranks(self, layers):
        return {name: layer.grown(2 * layer.rank) for name, layer in layers.items()}


BOUND = {"of_1": {"rank": 5, "pinned": True}, "of_2": {"rank": 6, "final_rank": 3}}


@pytest.mark.parametrize(
    ("rules", "schedule", "ends"),
    [
        (BOUND, fixed(), [8, 5, 6]),
        # The last stage brings layers to final ranks of their own.
        (BOUND, rebalance(), [8, 5, 3]),
        *((BOUND, schedule, None) for schedule in (early_budget(4), auto(share=0.5))),
        (BOUND, after_convergence(4, shared=False), [4, 5, 3]),
        # 0.9 of the sum of 1/i^2 up to 8 is in the first 4.
        (BOUND, energy(0.9, lowest=2), [4, 5, 3]),
        (BOUND, to(GrowTo(10), Rank(4)), [4, 5, 3]),
        (BOUND, to(Double(), Rank(3)), [3, 5, 3]),
        (BOUND, to(Rank({"0": 4, "[12]": 2}), GrowTo({"0": 9}), Rank(8)), [8, 5, 3]),
        # A pinned layer does not grow, and one that is small already stays below.
        ({"of_1": {"rank": 5, "pinned": True}, "of_2": {"rank": 6, "final_rank": 6}}, grow(16), [16, 5, 6]),
        ({"of_0": {"highest": 9}, "of_1": {"lowest": 10}, "of_2": {"final_rank": 11}}, grow(10), [9, 10, 11]),
        # A pool that all layers share alike; a layer with a final rank reaches the share alone.
        ({}, early_budget(share=0.5), [4, 4, 4]),
        ({"of_0": 4, "of_1": {"rank": 8, "final_rank": 2}, "of_2": 4}, early_budget(share=0.8), [4, 2, 4]),
        # A stage may name ranks that layers have already, and leave out some layers.
        *(({}, to(target), [8] * 3) for target in (Rank(8), Towards(8), Energy(0.5, lowest=8), GrowTo(8))),
        ({}, to(Budget(final_rank=8)), [8, 8, 8]),
        # What only the data will tell is not refused.
        *(({}, to(first, Budget(share=0.1, lowest=3)), None) for first in (Energy(0.9), Budget(share=0.5))),
    ],
)
def test_schedules_lead_layers_to_these_ranks_within_their_bounds(rules, schedule, ends):
    check_model(small(**rules), schedule, RUN)
    assert ends is None or [*final_ranks(small(**rules), schedule).values()] == ends


def test_a_frozen_layer_keeps_its_rank_and_its_update_before_the_run_as_in_it():
    """It brings nothing, so the pool alone would leave one direction of it."""
    model = updated(small())
    frozen = model[2].requires_grad_(False)
    update = frozen.delta_weight()
    assert final_ranks(model, early_budget(2))["2"] == 8
    # The frozen layer alone has 8 * 52 parameters.
    assert "at least 492 parameters" in refusal(model, to(Budget(parameters=450)))
    check_model(model, early_budget(2), RUN, rules_of(**{"2": {"highest": 8}}))
    loop = Training(model, [torch.optim.AdamW(dynrank.adapter_parameters(model))])
    drive(to(Budget(parameters=500)), loop, 8, lambda: model(torch.ones(4, 16)).square().mean())
    assert (model[0].rank, model[1].rank, frozen.rank) == (1, 1, 8)
    torch.testing.assert_close(frozen.delta_weight(), update)


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        # Layer 0 has room for rank 16.
        ([*to(Rank(8)), Stage(At(step=1), GrowTo(13), arguments=["K"])], "stage 2: rank 13 is|12 of '1'|('K',)"),
        (to(GrowTo(14), Budget(parameters=1)), "of '1'|of '2'|stage 2: the budget must be at least"),
        (to(Rank({"0": 4, "attention": 2})), "'attention' matches no LoRA layer"),
        # A shrink to a higher rank, a growth to a lower one, a lowest rank above that of the layers.
        (to(Rank(9)), "stage 1: Rank(rank=9) changes none of the ranks [8]|('to',)"),
        *((to(target), "changes none of") for target in (Rank({"0": 12}), GrowTo(7), Energy(0.9, lowest=9))),
        (to(Rank(4), Rank(8)), "stage 2: Rank(rank=8) changes none of the ranks [4]"),
    ],
)
def test_stage_that_cannot_act_is_refused_with_layers_and_argument(schedule, said):
    message = refusal(small(), schedule)
    assert all(words in message for words in said.split("|")), message
    assert "of '0'" not in message
    assert "dynrank.add_lora" in refusal(nn.Linear(2, 2), schedule)


@pytest.mark.parametrize(
    ("before", "rules", "enough", "short", "words"),
    [
        ([], {}, {"share": 0.25, "lowest": 2}, {"share": 0.249}, "stage 1 254 256 share lowest"),
        # The lowest ranks cost 10/8 of COST.
        ([GrowTo(12)], {}, {"parameters": 1280, "lowest": 10}, {"parameters": COST}, "stage 2 1,024 1,280"),
        # Wherever the first ends.
        ([Energy(0.9, lowest=4)], {}, {"parameters": 512, "lowest": 4}, {"parameters": 400}, "stage 2 400 512"),
        ([], BOUND, {"parameters": 2 * 40 + 5 * 36 + 3 * 52, "lowest": 2}, {"parameters": 415}, "at least 416"),
    ],
)
def test_budget_below_the_lowest_ranks_is_refused(before, rules, enough, short, words):
    check_model(small(**rules), [*to(*before), *early_budget(**enough)], RUN)
    message = refusal(small(**rules), [*to(*before), *early_budget(**enough | short)])
    assert all(word in message for word in words.split()), message


# A rank map


def test_a_key_that_begins_at_the_first_letter_of_a_name_is_of_the_model_that_peft_has_wrapped():
    net = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    model = get_peft_model(net, LoraConfig(r=8, target_modules=["0", "1"], rank_pattern={"^0": 3}))
    assert [layer.rank for _, layer in dynrank.lora_layers(model)] == [3, 8]
    for key in ("^0", "^base_model.model.0"):
        bounds = BoundLayers.of(model, rules_of(**{key: {"pinned": True}})).bounds
        assert [bound.pinned for bound in bounds.values()] == [True, False]


def test_the_first_of_the_schedules_rules_goes_before_the_layers_own_as_a_whole():
    model = small(of_0={"rank": 6, "final_rank": 2}, of_1={"final_rank": 3}, of_2={"pinned": True})
    bounds = BoundLayers.of(model, rules_of(**{"0": {"highest": 4}, "[02]": {"lowest": 3}})).bounds
    assert [*bounds.values()] == [RankBounds(highest=4), RankBounds(final_rank=3), RankBounds(lowest=3)]


CUT = early_budget(4)
TWICE = early_budget(6) + early_budget(4, at=0.7)


@pytest.mark.parametrize(
    ("frozen", "key", "rule", "schedule", "said"),
    [
        ([], "o_proj", {"pinned": True}, CUT, "'o_proj' matches no LoRA layer; nearest: ['0'"),
        ([], "0", {"lowest": 9}, CUT, "'0' ends at rank 8, because no stage brings it further|RankBounds(lowest=9)"),
        ([], "[12]", {"highest": 4}, grow(10), "'1' ends at rank 8|'2' ends at rank 8|no stage|RankBounds(highest=4)"),
        ([], "0", {"final_rank": 9}, CUT, "rank 8, because no stage brings it further|RankBounds(final_rank=9)"),
        ([0], "0", {"highest": 4}, CUT, "'0' ends at rank 8, because it is frozen, outside|(highest=4)"),
        # In a later stage, whatever the data.
        ([], ".*", {"lowest": 5}, TWICE, "stage 2: the budget must be at least|(final_rank, lowest, rank_map)"),
    ],
)
def test_a_rule_against_the_model_or_the_schedule_is_refused_by_name(frozen, key, rule, schedule, said):
    model = small()
    for number in frozen:
        model[number].requires_grad_(False)
    message = refusal(model, schedule, rules_of(**{key: rule}))
    assert all(words in message for words in said.split("|")), message
    assert "'rank_map'" in message or ", rank_map)" in message
    hidden = rules_of(**{"0": {"highest": 8}, "[0]": {"pinned": True}})
    assert "'[0]' is hidden by '0'" in refusal(model, schedule, hidden)


class Blind(Target):
    """Of a user's who does not ask for bounds, and leaves out a layer, which keeps its rank."""

    def __init__(self, rank):
        self.rank = rank

    def ranks(self, layers):
        return {name: self.rank for name in layers if name != "2"}


@pytest.mark.parametrize(
    ("frozen", "rules", "said"),
    [
        ([], {"1": {"pinned": True}}, "rank 4 to the layer '1', whose lowest rank is 8 and highest 8"),
        ([], {"1": {"lowest": 6}}, "rank 4 to the layer '1', whose lowest rank is 6 and highest 12"),
        ([], {"1": {"highest": 3}}, "rank 4 to the layer '1', whose lowest rank is 1 and highest 3"),
        ([0], {}, "rank 4 to the layer '0', whose lowest rank is 8 and highest 8, .* it is frozen"),
    ],
)
def test_a_users_target_cannot_break_bounds_before_the_run_nor_in_it(frozen, rules, said):
    model = small()
    assert [*due(model, Blind(4), {}).ranks().values()] == [4, 4, 8]
    for number in frozen:
        model[number].requires_grad_(False)
    with pytest.raises(ConfigurationError) as caught:
        due(model, Blind(4), rules_of(**rules)).ranks()
    for message in (str(caught.value), refusal(model, to(Blind(4)), rules_of(**rules))):
        assert re.match(rf"Blind\(rank=4\) gives {said}", message)
