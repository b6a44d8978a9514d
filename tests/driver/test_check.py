"""What a schedule means for a model: bounds, needs, where ranks may end, and what does not fit."""

from functools import partial

import peft
import pytest
import torch
import transformers
from torch import nn
from trained import updated

import dynrank
from dynrank.change.resize import LayerDirections
from dynrank.driver.check import check_model, check_training, depends_on_data, final_ranks, layer_states
from dynrank.driver.training import Training
from dynrank.errors import ConfigurationError
from dynrank.schedules import How, Stage, after_convergence, anneal, early_budget, energy, grow
from dynrank.targets import Budget, Energy, GrowTo, Rank, Target, Towards
from dynrank.triggers import At, Run

RUN = Run(total_steps=100)
NOW = At(step=1)


def model(rank=8, **rank_map):
    """Three layers, (d_out, d_in) = (24, 16), (12, 24) and (40, 12)."""
    net = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 12), nn.Linear(12, 40))
    rules = {key.removeprefix("layer_"): rule for key, rule in rank_map.items()}
    return dynrank.add_lora(net, rank=rank, rank_map=rules, target_modules=["0", "1", "2"])


def layers_of(net):
    return dict(dynrank.lora_layers(net))


class Double(Target):
    """Of a user's."""

    def ranks(self, layers):
        return {name: layer.grown(2 * layer.rank) for name, layer in layers.items()}


# Bounds and measurements


def test_layer_states_bound_each_layer():
    net = model(layer_1={"rank": 5, "pinned": True}, layer_2={"rank": 6, "final_rank": 3})
    bounds = {}
    for last in (False, True):
        states = layer_states(layers_of(net), last=last, target=Rank(4), directions=LayerDirections(layers_of(net)))
        assert [(s.rank, s.d_out, s.d_in) for s in states.values()] == [(8, 24, 16), (5, 12, 24), (6, 40, 12)]
        # The target does not ask for singular values.
        assert {s.values for s in states.values()} == {None}
        bounds[last] = [(s.lowest, s.highest, s.final_rank) for s in states.values()]
    assert bounds[False] == [(1, 16, None), (5, 5, None), (3, 12, 3)]
    assert bounds[True] == [(1, 16, None), (5, 5, None), (3, 3, 3)]


def test_layer_states_hold_the_singular_values_of_each_update():
    net = updated(model())
    for layer in layers_of(net).values():
        layer.scaling = 3.0
    states = layer_states(layers_of(net), last=True, target=Energy(0.9), directions=LayerDirections(layers_of(net)))
    for name, layer in layers_of(net).items():
        dense = torch.linalg.svdvals(layer.delta_weight().double())[:8]
        torch.testing.assert_close(states[name].values, dense, rtol=1e-5, atol=1e-5)


# Where ranks may end


@pytest.mark.parametrize(
    ("schedule", "ends"),
    [
        ([], [8, 5, 6]),
        (after_convergence(4, shared=False), [4, 5, 3]),
        (anneal(2, shared=False), [2, 5, 3]),
        # 0.9 of the sum of 1/i^2 up to 8 is in the first 4.
        (energy(0.9, lowest=2), [4, 5, 3]),
        (energy(0.9, lowest=7), [7, 5, 3]),
        # The last layer's own final rank would be a shrink.
        (grow(10), [10, 5, 6]),
        ([Stage(NOW, GrowTo(10)), Stage(NOW, Rank(4))], [4, 5, 3]),
        ([Stage(NOW, Double())], [16, 5, 6]),
    ],
)
def test_final_ranks_of_free_pinned_and_bound_layers(schedule, ends):
    net = model(layer_1={"rank": 5, "pinned": True}, layer_2={"rank": 6, "final_rank": 3})
    assert list(final_ranks(net, schedule).values()) == ends


def test_expected_ranks_of_a_budget_spend_its_pool_and_are_only_expected():
    schedule = early_budget(share=0.5, highest=6)
    ranks = final_ranks(model(), schedule)
    spent = sum(ranks[name] * size for name, size in zip("012", (40, 36, 52), strict=True))
    assert COST / 2 - 52 < spent <= COST / 2
    assert depends_on_data(schedule)
    assert not depends_on_data(anneal(2, shared=False))


# What does not fit


def refusal(net, schedule):
    with pytest.raises(ConfigurationError) as caught:
        check_model(net, schedule, RUN)
    return str(caught.value)


def test_model_without_lora_layers_is_refused():
    assert "target_modules" in refusal(nn.Linear(2, 2), [])


def test_growth_beyond_the_shape_of_a_layer_is_refused_with_stage_layer_and_key():
    message = refusal(model(), [Stage(NOW, Rank(8)), Stage(NOW, GrowTo(13), key="K")])
    assert "stage 2: rank 13 is above min(d_in, d_out) = 12 of '1'; set K" in message
    assert "of '2'" in message
    # Layer 0 has room for rank 16.
    assert "of '0'" not in message


def test_growth_of_a_pinned_layer_is_nobodys_concern():
    net = model(layer_1={"rank": 5, "pinned": True}, layer_2={"rank": 6, "final_rank": 3})
    check_model(net, grow(16), RUN)


def test_shrink_to_a_rank_above_a_small_layers_shape_is_none():
    """A layer that the rank map has made small stays below; nobody asks it to grow."""
    net = model(rank=12, layer_0={"rank": 16}, layer_1={"rank": 4})
    check_model(net, after_convergence(14, shared=False), RUN)
    check_model(net, energy(0.9), RUN)
    assert final_ranks(net, after_convergence(14, shared=False)) == {"0": 14, "1": 4, "2": 12}


def test_share_that_a_layer_with_a_final_rank_reaches_alone_is_a_change():
    net = model(rank=4, layer_1={"rank": 8, "final_rank": 2})
    check_model(net, early_budget(share=0.8), RUN)
    assert final_ranks(net, early_budget(share=0.8)) == {"0": 4, "1": 2, "2": 4}
    assert "changes none of the ranks [4]" in refusal(net, early_budget(share=1.0))


def test_contradictions_of_the_schedule_come_first():
    net = model(rank=4, layer_0={"rank": 16, "pinned": True}, layer_1={"rank": 12, "final_rank": 6})
    assert "changes none of the ranks [4]" in refusal(net, after_convergence(8))
    check_model(net, after_convergence(4), RUN)


COST = 8 * (24 + 16) + 8 * (12 + 24) + 8 * (40 + 12)


@pytest.mark.parametrize(
    ("before", "enough", "short", "words"),
    [
        ([], {"parameters": 256, "lowest": 2}, {"parameters": 255}, "stage 1 255 256 3 layers parameters"),
        ([], {"share": 0.25, "lowest": 2}, {"share": 0.249}, "stage 1 254 256 share lowest"),
        # The lowest ranks cost 10/8 of COST.
        ([GrowTo(12)], {"parameters": 1280, "lowest": 10}, {"parameters": COST}, "stage 2 1,024 1,280"),
        ([Rank(4)], {"share": 0.75, "lowest": 3}, {"share": 0.5}, "stage 2 256 384 share"),
        # wherever the first ends
        ([Energy(0.9, lowest=4)], {"parameters": 512, "lowest": 4}, {"parameters": 400}, "stage 2 400 512"),
    ],
)
def test_budget_below_the_lowest_ranks_is_refused(before, enough, short, words):
    before = [Stage(NOW, target) for target in before]
    check_model(model(), [*before, *early_budget(**enough)], RUN)
    message = refusal(model(), [*before, *early_budget(**enough | short)])
    assert all(word in message for word in words.split()), message


@pytest.mark.parametrize("first", [Energy(0.9), Budget(share=0.5)])
def test_budget_of_what_only_the_data_will_tell_is_allowed(first):
    check_model(model(), [Stage(NOW, first), Stage(NOW, Budget(share=0.1, lowest=3))], RUN)


def test_budget_counts_pinned_layers_and_final_ranks_of_their_own():
    net = model(layer_1={"rank": 6, "pinned": True}, layer_2={"rank": 8, "final_rank": 5})
    least = 2 * 40 + 6 * 36 + 5 * 52
    check_model(net, early_budget(parameters=least, lowest=2), RUN)
    assert f"at least {least:,}" in refusal(net, early_budget(parameters=least - 1, lowest=2))


@pytest.mark.parametrize(
    "schedule",
    [
        [Stage(NOW, Rank(9), key="K")],
        [Stage(NOW, GrowTo(7), key="K")],
        [Stage(NOW, Energy(0.9, lowest=9), key="K")],
        [Stage(NOW, Rank(4)), Stage(NOW, Rank(8), key="K")],
    ],
    ids=["shrink to a higher rank", "growth to a lower rank", "lowest above the rank", "after a stage"],
)
def test_stage_that_could_change_no_rank_is_refused_with_its_key(schedule):
    message = refusal(model(), schedule)
    assert f"stage {len(schedule)}: {schedule[-1].to} changes none of the ranks" in message
    assert message.endswith("set K")


@pytest.mark.parametrize("target", [Rank(8), Towards(8), Energy(0.5, lowest=8), GrowTo(8), Budget(final_rank=8)])
def test_target_that_names_the_present_ranks_is_no_contradiction(target):
    check_model(model(), [Stage(NOW, target)], RUN)


def test_every_fault_is_listed():
    message = refusal(model(), [Stage(NOW, GrowTo(14), key="K"), Stage(NOW, Budget(parameters=1), key="L")])
    assert message.count("\n") == 3, message


FACTORED = [torch.optim.Adafactor, partial(transformers.Adafactor, lr=1e-3, relative_step=False)]


@pytest.mark.parametrize("make", FACTORED, ids=["torch", "transformers"])
def test_convolution_of_peft_is_refused_to_adafactor_before_the_first_step(make):
    """Its factor has four dimensions, of which the optimizer keeps rows of the last."""
    net = peft.get_peft_model(nn.Sequential(nn.Conv2d(3, 8, 3)), peft.LoraConfig(r=4, target_modules=["0"]))
    training = Training(net, [make(dynrank.adapter_parameters(net))])
    stages = early_budget(2, how=How())
    with pytest.raises(ConfigurationError, match=r"Adafactor keeps means .*\[4, 3, 3, 3\].*optimizer_state=reset"):
        check_training(training, stages)
    check_training(training, early_budget(2, how=How(optimizer_state="reset")))


def test_a_stage_of_some_layers_leads_them_there_and_is_checked_before_the_first_step():
    net = model()
    assert final_ranks(net, [Stage(NOW, Rank({"0": 4, "[12]": 6})), Stage(NOW, GrowTo({"2": 9}))]) == {
        "0": 4, "1": 6, "2": 9
    }  # fmt: skip
    check_model(net, [Stage(NOW, Rank({"0": 4}))], RUN)
    for target, said in (
        (Rank({"0": 4, "attention": 2}), "'attention' matches no LoRA layer"),
        (GrowTo({"1": 13}), r"stage 1: rank 13 is above min\(d_in, d_out\) = 12 of '1'"),
        (Rank({"0": 12}), "changes none of the ranks"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            check_model(net, [Stage(NOW, target)], RUN)
