"""What a schedule means for a model: bounds, needs, where ranks may end, and what does not fit."""

import peft
import pytest
import torch
from torch import nn
from trained import updated

import dynrank
from dynrank.change.directions import LayerDirections
from dynrank.driver.bounds import bounds_of
from dynrank.driver.checks import NO_RULES, check_model, check_training, depends_on_data, final_ranks
from dynrank.driver.due import DueStage
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
    return dynrank.add_lora(net, rank=rank, alpha=rank, rank_map=rules, target_modules=["0", "1", "2"])


def layers_of(net):
    return dict(dynrank.lora_layers(net))


def states_of(net, target, *, last):
    return due(net, target, last=last).states()


def due(net, target, *, last=True, rules=NO_RULES):
    layers = layers_of(net)
    return DueStage(Stage(NOW, target), last, "", layers, bounds_of(layers, rules), LayerDirections(layers), {})


class Double(Target):
    """Of a user's."""

    def ranks(self, layers):
        return {name: layer.grown(2 * layer.rank) for name, layer in layers.items()}


# Bounds and measurements


def test_states_bound_each_layer():
    net = model(layer_1={"rank": 5, "pinned": True}, layer_2={"rank": 6, "final_rank": 3})
    bounds = {}
    for last in (False, True):
        states = states_of(net, Rank(4), last=last)
        assert [(s.rank, s.d_out, s.d_in) for s in states.values()] == [(8, 24, 16), (5, 12, 24), (6, 40, 12)]
        # The target does not ask for singular values.
        assert {s.values for s in states.values()} == {None}
        bounds[last] = [(s.lowest, s.highest, s.final_rank) for s in states.values()]
    assert bounds[False] == [(1, 16, None), (5, 5, None), (3, 12, 3)]
    assert bounds[True] == [(1, 16, None), (5, 5, None), (3, 3, 3)]


def test_a_frozen_layer_keeps_its_rank_before_the_run_as_in_it():
    net = model()
    layers_of(net)["2"].requires_grad_(False)
    assert final_ranks(net, early_budget(2))["2"] == 8
    # The frozen layer alone has 8 * (12 + 40) parameters.
    with pytest.raises(ConfigurationError, match="at least 492 parameters"):
        check_model(net, [Stage(NOW, Budget(parameters=450))], RUN)
    check_model(net, [Stage(NOW, Budget(parameters=500))], RUN)


class Half(Target):
    """Of a user's who does not know of pinned layers."""

    def ranks(self, layers):
        return {name: layer.rank // 2 for name, layer in layers.items()}


def test_a_target_that_changes_a_pinned_layer_is_refused_by_name():
    net = model(layer_1={"pinned": True})
    with pytest.raises(ConfigurationError, match=r"gives rank 4 to the layer '1', which is pinned at rank 8"):
        check_model(net, [Stage(NOW, Half())], RUN)
    with pytest.raises(ConfigurationError, match="'1', which is pinned"):
        due(net, Half()).ranks()


def test_a_target_that_changes_a_frozen_layer_or_leaves_one_out_is_refused_by_name():
    class OfOthers(Target):
        def ranks(self, layers):
            return {name: layer.rank for name, layer in layers.items() if name != "1"}

    net = model()
    layers_of(net)["2"].requires_grad_(False)
    with pytest.raises(ConfigurationError, match=r"gives rank 4 to the layer '2', which is frozen at rank 8"):
        check_model(net, [Stage(NOW, Half())], RUN)
    with pytest.raises(ConfigurationError, match=r"gives no rank to the layer '1'"):
        check_model(net, [Stage(NOW, OfOthers())], RUN)


def test_states_hold_the_singular_values_of_each_update():
    net = updated(model())
    for layer in layers_of(net).values():
        layer.scaling = 3.0
    states = states_of(net, Energy(0.9), last=True)
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
        ([Stage(NOW, Rank({"0": 4, "[12]": 2})), Stage(NOW, GrowTo({"0": 9}))], [9, 5, 3]),
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


COST = 8 * (24 + 16) + 8 * (12 + 24) + 8 * (40 + 12)


def refusal(net, schedule):
    with pytest.raises(ConfigurationError) as caught:
        check_model(net, schedule, RUN)
    return f"{caught.value} {caught.value.arguments}"


def test_model_without_lora_layers_is_refused():
    assert "dynrank.add_lora" in refusal(nn.Linear(2, 2), [])


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        # Layer 0 has room for rank 16.
        (
            [Stage(NOW, Rank(8)), Stage(NOW, GrowTo(13), arguments=["K"])],
            ["stage 2: rank 13 is", "12 of '1'", "('K',)"],
        ),
        ([Stage(NOW, GrowTo({"1": 13}))], ["stage 1: rank 13 is above min(d_in, d_out) = 12 of '1'"]),
        ([Stage(NOW, GrowTo(14)), Stage(NOW, Budget(parameters=1), arguments=["L"])], ["of '1'", "of '2'", "'L'"]),
        ([Stage(NOW, Rank({"0": 4, "attention": 2}))], ["'attention' matches no LoRA layer"]),
        # A shrink to a higher rank, a growth to a lower one, a lowest rank above that of the layers.
        ([Stage(NOW, Rank(9), arguments=["K"])], ["stage 1: Rank(rank=9) changes none of the ranks", "'K'"]),
        ([Stage(NOW, Rank({"0": 12}))], ["changes none of the ranks"]),
        ([Stage(NOW, GrowTo(7))], ["changes none of the ranks"]),
        ([Stage(NOW, Energy(0.9, lowest=9))], ["changes none of the ranks"]),
        ([Stage(NOW, Rank(4)), Stage(NOW, Rank(8))], ["stage 2: Rank(rank=8) changes none of the ranks [4]"]),
    ],
)
def test_stage_that_cannot_act_is_refused_with_layers_and_argument(schedule, said):
    message = refusal(model(), schedule)
    assert all(words in message for words in said), message
    assert "of '0'" not in message


@pytest.mark.parametrize(
    ("rules", "schedule"),
    [
        # Growth of a pinned layer is nobody's concern.
        ({"layer_1": {"rank": 5, "pinned": True}, "layer_2": {"rank": 6, "final_rank": 6}}, grow(16)),
        # What only the data will tell is.
        ({}, [Stage(NOW, Energy(0.9)), Stage(NOW, Budget(share=0.1, lowest=3))]),
        ({}, [Stage(NOW, Budget(share=0.5)), Stage(NOW, Budget(share=0.1, lowest=3))]),
        # A stage may name ranks that layers have already, and leave out some layers.
        ({}, [Stage(NOW, Rank(8))]),
        ({}, [Stage(NOW, Towards(8))]),
        ({}, [Stage(NOW, Energy(0.5, lowest=8))]),
        ({}, [Stage(NOW, GrowTo(8))]),
        ({}, [Stage(NOW, Budget(final_rank=8))]),
        ({}, [Stage(NOW, Rank({"0": 4}))]),
    ],
)
def test_stage_that_could_act_is_allowed(rules, schedule):
    check_model(model(**rules), schedule, RUN)


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


def test_budget_counts_pinned_layers_and_final_ranks_of_their_own():
    net = model(layer_1={"rank": 6, "pinned": True}, layer_2={"rank": 8, "final_rank": 5})
    least = 2 * 40 + 6 * 36 + 5 * 52
    check_model(net, early_budget(parameters=least, lowest=2), RUN)
    assert f"at least {least:,}" in refusal(net, early_budget(parameters=least - 1, lowest=2))


def test_convolution_of_peft_is_refused_to_adafactor_before_the_first_step():
    """Its factor has four dimensions, of which the optimizer keeps rows of the last."""
    net = peft.get_peft_model(nn.Sequential(nn.Conv2d(3, 8, 3)), peft.LoraConfig(r=4, target_modules=["0"]))
    training = Training(net, [torch.optim.Adafactor(dynrank.adapter_parameters(net))])
    with pytest.raises(ConfigurationError, match=r"Adafactor keeps means .*\[4, 3, 3, 3\].*optimizer_state=.reset"):
        check_training(training, early_budget(2, how=How()))
    check_training(training, early_budget(2, how=How(optimizer_state="reset")))
