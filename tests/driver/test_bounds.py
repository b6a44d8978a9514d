"""What single layers may become by a schedule's rank map, in models of PEFT and add_lora, and what is refused."""

import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

import dynrank
from dynrank.change.directions import LayerDirections
from dynrank.driver.bounds import bounds_of
from dynrank.driver.checks import check_model, final_ranks
from dynrank.driver.driver import RankDriver
from dynrank.driver.due import DueStage
from dynrank.driver.importance import LayerImportance
from dynrank.driver.training import Training
from dynrank.errors import ConfigurationError
from dynrank.rank_map import RankBounds, read_rank_map
from dynrank.schedules import Stage, anneal, auto, early_budget, energy, fixed, grow, rebalance
from dynrank.targets import Budget, Energy, GrowTo, Rank, Target, Towards
from dynrank.triggers import At, Run

RUN = Run(total_steps=10)
NOW = At(step=1)
X = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Names as in a Llama: attention with o_proj, and an MLP; a step changes every layer."""

    def __init__(self, width=12, wide=20):
        super().__init__()
        names = ("q_proj", "o_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in names})
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(width, wide), "down_proj": nn.Linear(wide, width)})

    def forward(self, x):
        x = x + self.self_attn["o_proj"](torch.tanh(self.self_attn["q_proj"](x)))
        return x + self.mlp["down_proj"](torch.tanh(self.mlp["up_proj"](x)))


def net(blocks=2):
    torch.manual_seed(0)
    return nn.ModuleDict({"layers": nn.Sequential(*(Block() for _ in range(blocks)))})


NAMES = [name for name, module in net().named_modules() if isinstance(module, nn.Linear)]


def wrapped(rank=8, **pattern):
    """By PEFT, with its own rank_pattern."""
    options = {"target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"], "rank_pattern": pattern}
    return get_peft_model(net(), LoraConfig(r=rank, lora_alpha=rank, **options))


def own(rank=8, **rank_map):
    return dynrank.add_lora(net(), rank=rank, alpha=rank, rank_map=rank_map)


def run_of(model, driver, steps=10, step=0, optimizer=None):
    """Train from ``step`` on; the loop."""
    loop = Training(model, [optimizer or torch.optim.AdamW(dynrank.adapter_parameters(model), lr=1e-2)], step)
    driver.start(loop, Run(total_steps=10))
    blocks = next(module for module in model.modules() if isinstance(module, nn.Sequential))
    while loop.step < steps:
        driver.advance(loop)
        blocks(X).square().mean().backward()
        loop.optimizers[0].step()
        loop.step += 1
        driver.end_step(loop)
        loop.optimizers[0].zero_grad()
    return loop


def ranks_of(model, word=""):
    return [layer.rank for name, layer in dynrank.lora_layers(model) if word in name]


def rules_of(rank_map):
    return read_rank_map(rank_map, RankBounds)


# A rule and a layer


def test_a_key_that_begins_at_the_first_letter_of_a_name_is_of_the_model_that_peft_has_wrapped():
    first = f"^{NAMES[0]}"
    model = wrapped(**{first: 3})
    assert ranks_of(model)[:2] == [3, 8]
    for key in (first, f"^base_model.model.{NAMES[0]}"):
        bounds = bounds_of(dict(dynrank.lora_layers(model)), rules_of({key: {"pinned": True}}))
        assert [bound.pinned for bound in bounds.values()] == [True] + [False] * (len(NAMES) - 1)


def test_the_schedules_rule_goes_before_the_layers_own_as_a_whole():
    model = own(o_proj={"rank": 6, "final_rank": 2}, mlp={"pinned": True})
    layers = dict(dynrank.lora_layers(model))
    bounds = bounds_of(layers, rules_of({r"0\..*o_proj": {"highest": 4}, "down_proj": {"pinned": False}}))
    assert [bounds[name] for name in NAMES] == [
        *(RankBounds(), RankBounds(highest=4), RankBounds(pinned=True), RankBounds()),
        *(RankBounds(), RankBounds(final_rank=2), RankBounds(pinned=True), RankBounds()),
    ]


@pytest.mark.parametrize("make", [wrapped, own])
def test_peft_models_and_own_are_steered_alike(make):
    """o_proj stays, and not even its factors are balanced; the MLP is capped; no layer of attention is below 3."""
    model = make()
    rules = {"o_proj": {"pinned": True}, "mlp": {"highest": 2}, "attention": {"lowest": 3}}
    driver = RankDriver(early_budget(4, at=0.4), rank_map=rules)
    loop = run_of(model, driver, steps=4)
    before = {n: la.lora_A.detach().clone() for n, la in dynrank.lora_layers(model) if "o_proj" in n}
    pool = Budget(final_rank=4).pool(_states(model, {"o_proj": {"pinned": True}}))
    driver.advance(loop)
    assert ranks_of(model, "o_proj") == [8, 8]
    for name, layer in dynrank.lora_layers(model):
        assert name not in before or torch.equal(layer.lora_A, before[name])
    assert max(ranks_of(model, "mlp")) == 2
    assert min(ranks_of(model, "q_proj")) >= 3
    assert {report.layer for report in driver.history[0].layers}.isdisjoint(before)
    spent = sum(layer.rank * layer.params_per_rank for _, layer in dynrank.lora_layers(model))
    # Bounds move parameters between layers, and leave some where all are at their highest.
    assert spent <= pool
    assert spent > pool - 24 or ranks_of(model, "q_proj") == [8, 8]


def test_first_pattern_wins_and_words_name_kinds():
    rules = rules_of({r"layers\.0\..*": {"final_rank": 5}, "attention": {"final_rank": 4}, "mlp": {"final_rank": 3}})
    assert [*final_ranks(wrapped(), early_budget(4), rules).values()] == [5, 5, 5, 5, 4, 4, 3, 3]


# All targets keep bounds

RULES = st.sampled_from(
    [
        *({"pinned": True}, {"highest": 3}, {"highest": 8}, {"lowest": 2}, {"lowest": 5}, {"lowest": 2, "highest": 4}),
        *({"lowest": 3, "highest": 3}, {"final_rank": 2}, {"final_rank": 6, "lowest": 4, "highest": 7}),
    ]
)
TARGETS = st.one_of(
    st.builds(Rank, st.integers(1, 8)),
    st.builds(Rank, st.just({"o_proj": 3, "mlp": 6})),
    st.builds(Towards, st.integers(1, 8), st.just(1), st.integers(1, 3)),
    st.builds(Energy, st.floats(0.1, 1.0), lowest=st.integers(1, 3)),
    st.builds(Budget, share=st.floats(0.05, 1.0), by=st.sampled_from(["importance", "weight"])),
    st.builds(lambda rank, left: Budget(final_rank=rank, left=left), st.integers(1, 8), st.integers(0, 2)),
    st.builds(GrowTo, st.integers(1, 12)),
)
MODEL = own()
LAYERS = dict(dynrank.lora_layers(MODEL))
DIRECTIONS = LayerDirections(LAYERS)


def _due(target, rules, scores=None, *, last=True):
    bounds = bounds_of(LAYERS, rules)
    importance = {name: LayerImportance(value, 0.0) for name, value in (scores or {}).items()}
    return DueStage(Stage(NOW, target), last, "", LAYERS, bounds, DIRECTIONS, importance)


def _states(model, rank_map):
    layers = dict(dynrank.lora_layers(model))
    bounds = bounds_of(layers, rules_of(rank_map))
    return DueStage(Stage(NOW, Rank(1)), True, "", layers, bounds, LayerDirections(layers), {}).states()


SCORES = st.lists(st.floats(0.0, 100.0), min_size=len(NAMES), max_size=len(NAMES))


@settings(max_examples=200, deadline=None)
@given(TARGETS, st.dictionaries(st.sampled_from(NAMES), RULES), SCORES, st.booleans())
def test_every_target_leaves_every_layer_within_its_bounds(target, rank_map, scores, last):
    rules = rules_of({re.escape(name): rule for name, rule in rank_map.items()})
    due = _due(target, rules, dict(zip(NAMES, scores, strict=True)), last=last)
    states = due.states()
    if isinstance(target, Budget) and target.share is None and target.pool(states) < target.floor_parameters(states):
        with pytest.raises(ConfigurationError, match="a budget must be at least"):
            due.ranks()
        return
    ranks = due.ranks()
    grows = isinstance(target, GrowTo)
    for name in NAMES:
        rule = rank_map.get(name, {})
        low = rule.get("final_rank", rule.get("lowest", 1))
        high = rule.get("final_rank", math.inf) if last else math.inf
        high = min(high, rule.get("highest", 12))
        assert ranks[name] == 8 or not rule.get("pinned")
        assert ranks[name] >= low
        # A growth lowers no layer.
        assert ranks[name] <= high or (grows and ranks[name] == 8) or rule.get("pinned")


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.sampled_from(NAMES), RULES.filter(lambda rule: "final_rank" not in rule)),
    st.lists(st.floats(0.01, 100.0), min_size=len(NAMES), max_size=len(NAMES)),
    st.integers(1, 3),
    st.one_of(st.none(), st.integers(5, 9)),
    st.integers(0, 1500),
)
def test_a_budget_with_bounds_stays_in_its_pool_and_loses_none_that_could_be_used(
    rank_map, scores, lowest, highest, more
):
    rules = rules_of({re.escape(name): rule for name, rule in rank_map.items()})
    target = Budget(parameters=1, lowest=lowest, highest=highest)
    low = {}
    high = {}
    for name in NAMES:
        rule = rank_map.get(name, {})
        low[name] = 8 if rule.get("pinned") else max(lowest, rule.get("lowest", 1))
        high[name] = 8 if rule.get("pinned") else min(8, rule.get("highest", 8), highest or 8)
    if any(low[name] > high[name] for name in NAMES):
        return
    size = {name: LAYERS[name].params_per_rank for name in NAMES}
    parameters = sum(low[name] * size[name] for name in NAMES) + more
    target = replace(target, parameters=parameters)
    ranks = _due(target, rules, dict(zip(NAMES, scores, strict=True))).ranks()
    assert all(low[name] <= ranks[name] <= high[name] for name in NAMES)
    left = parameters - sum(ranks[name] * size[name] for name in NAMES)
    # What is left pays for one more direction of no layer that may have one.
    assert left >= 0
    assert all(size[name] > left for name in NAMES if ranks[name] < high[name])


def test_bounds_leave_the_apportioning_of_the_other_layers_as_it_is():
    scores = dict(zip(NAMES, range(1, 9), strict=True))
    free = _due(Budget(parameters=600), {}, scores).ranks()
    wide = {re.escape(name): RankBounds(lowest=1, highest=8) for name in NAMES}
    assert _due(Budget(parameters=600), wide, scores).ranks() == free


def test_a_growth_brings_layers_to_their_own_bounds():
    rules = rules_of({"o_proj": {"lowest": 10}, "q_proj": {"highest": 9}, "mlp": {"final_rank": 11}})
    ranks = final_ranks(wrapped(), grow(10), rules)
    assert [*ranks.values()] == [9, 10, 11, 11] * 2
    check_model(wrapped(), grow(10), RUN, rules)


# What is refused


def refusal(rank_map, schedule=None, model=None):
    with pytest.raises(ConfigurationError) as caught:
        check_model(model or wrapped(), early_budget(4) if schedule is None else schedule, RUN, rules_of(rank_map))
    assert "rank_map" in caught.value.arguments
    return str(caught.value)


@pytest.mark.parametrize(
    ("rank_map", "said"),
    [
        ({"o_prj": {"pinned": True}}, "'o_prj' matches no LoRA layer; nearest: ['o_proj'"),
        ({"attention": {"highest": 4}, "o_proj": {"pinned": True}}, "'o_proj' is hidden by 'attention'"),
        ({"o_proj": {"lowest": 9}}, "o_proj' and 1 more: lowest=9 is above its rank 8, and no stage raises it there"),
        ({"o_proj": {"final_rank": 9}}, "o_proj' and 1 more: final_rank=9 is above its rank 8"),
        ({"o_proj": {"lowest": 9}}, "set it to at most 8"),
    ],
)
def test_a_rule_that_fits_no_layer_or_no_rank_is_refused_by_name(rank_map, said):
    assert said in refusal(rank_map)


@pytest.mark.parametrize(
    ("rank_map", "schedule", "said"),
    [
        (
            {"mlp": {"highest": 4}},
            grow(10),
            "up_proj' and 3 more: highest=4 is below its rank 8, and no stage lowers it",
        ),
        ({"mlp": {"final_rank": 4}}, grow(10), "final_rank=4 is below its rank 8, and no stage lowers it there"),
        ({"mlp": {"highest": 2}}, early_budget(4, lowest=3), "highest=2 is below lowest=3 of stage 1; change one of"),
        ({"mlp": {"lowest": 6}}, early_budget(6, highest=5), "lowest=6 is above highest=5 of stage 1; change one of"),
    ],
)
def test_a_rule_against_the_schedule_is_refused(rank_map, schedule, said):
    assert said in refusal(rank_map, schedule)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"highest": 4}, "o_proj' and 1 more: highest=4 is below its rank 8, and it is frozen; set it to at least 8"),
        ({"final_rank": 4}, "final_rank=4 is below its rank 8, and it is frozen"),
        ({"lowest": 9}, "lowest=9 is above its rank 8, and it is frozen; set it to at most 8"),
    ],
)
def test_a_frozen_layer_cannot_come_into_bounds(rule, said):
    model = wrapped()
    for name, layer in dynrank.lora_layers(model):
        if "o_proj" in name:
            layer.lora_A.requires_grad_(False)
            layer.lora_B.requires_grad_(False)
    assert said in refusal({"o_proj": rule}, model=model)
    check_model(model, early_budget(4), RUN, rules_of({"o_proj": {"highest": 8}}))


def test_a_pool_that_the_lowest_ranks_exceed_names_the_rank_map():
    with pytest.raises(ConfigurationError, match=r"the budget must be at least .*\(final_rank, lowest, rank_map\)"):
        check_model(wrapped(), early_budget(4), RUN, rules_of({".*": {"lowest": 5}}))
    # Also in a later stage, whatever the data.
    with pytest.raises(ConfigurationError, match=r"stage 2: the budget must be at least .*rank_map\)"):
        check_model(wrapped(), early_budget(6) + early_budget(4, at=0.7), RUN, rules_of({".*": {"lowest": 5}}))


@pytest.mark.parametrize(
    "schedule", [fixed(), rebalance(), early_budget(4), auto(share=0.5), energy(0.9), anneal(2, shared=False), grow(10)]
)
def test_a_pin_fits_every_schedule(schedule):
    model = wrapped()
    check_model(model, schedule, RUN, rules_of({"o_proj": {"pinned": True}}))
    ends = final_ranks(model, schedule, rules_of({"o_proj": {"pinned": True}}))
    assert [rank for name, rank in ends.items() if "o_proj" in name] == [8, 8]


class Blind(Target):
    """Of a user's who does not ask for bounds."""

    def ranks(self, layers):
        return {name: 4 for name in layers}


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"pinned": True}, "which is pinned at rank 8; let its ranks"),
        ({"lowest": 6}, "which is bound by rank_map to ranks 6 to 12"),
        ({"highest": 3}, "which is bound by rank_map to ranks 1 to 3"),
        ({"final_rank": 5}, "which is bound by rank_map to rank 5"),
    ],
)
def test_a_users_target_cannot_break_bounds(rule, said):
    with pytest.raises(ConfigurationError, match=rf"Blind.* gives rank 4 to the layer '.*o_proj', {said}"):
        check_model(wrapped(), [Stage(NOW, Blind())], RUN, rules_of({"o_proj": rule}))


# Checkpoints

PINNED = {"o_proj": {"pinned": True}}
TWO_CUTS = early_budget(6, at=0.3) + early_budget(3, at=0.7)


def stopped(step, rank_map=PINNED):
    """(driver's state, loop) of a run that ends after ``step``."""
    driver = RankDriver(TWO_CUTS, rank_map=rank_map)
    loop = run_of(wrapped(), driver, steps=step)
    return driver.state_dict(), loop


def resumed(state, loop, rank_map):
    driver = RankDriver(TWO_CUTS, rank_map=rank_map)
    driver.load_state_dict(state)
    run_of(loop.model, driver, 10, loop.step, loop.optimizers[0])
    return driver


def test_a_resume_goes_on_with_the_rank_map_from_a_file_or_a_mapping(tmp_path):
    (tmp_path / "ranks.yaml").write_text("rank_pattern: {o_proj: {pinned: true}}\n")
    state, loop = stopped(5)
    torch.save(state, tmp_path / "state.pt")
    driver = resumed(torch.load(tmp_path / "state.pt", weights_only=True), loop, tmp_path / "ranks.yaml")
    assert [event.step for event in driver.history] == [3, 7]
    assert ranks_of(loop.model, "o_proj") == [8, 8]


@pytest.mark.parametrize("other", [None, {"o_proj": {"highest": 8}}, {**PINNED, "mlp": {"highest": 8}}])
def test_another_rank_map_is_refused_after_a_change(other):
    state, loop = stopped(5)
    with pytest.raises(ConfigurationError, match=r"made under another rank_map: .*'o_proj': RankBounds\(pinned=True\)"):
        resumed(state, loop, other)


def test_another_rank_map_before_the_first_change_applies_with_a_warning():
    state, loop = stopped(2)
    with pytest.warns(UserWarning, match="the rank_map is not the checkpoint's: it applies from step 2 on"):
        resumed(state, loop, {"mlp": {"pinned": True}})
    assert ranks_of(loop.model, "mlp") == [8, 8, 8, 8]
    state, loop = stopped(2)
    with pytest.raises(ConfigurationError, match="'gate_proj' matches no LoRA layer"):
        resumed(state, loop, {"gate_proj": {"pinned": True}})
