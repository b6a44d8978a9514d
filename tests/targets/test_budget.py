"""A budget against its description and, on small models, against the best of all ways to spend it."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrank.errors import ConfigurationError
from dynrank.targets import Budget, LayerState


def layer(values, d_out=100, d_in=100, **options):
    return LayerState(len(values), d_out, d_in, values=torch.tensor(values, dtype=torch.float64), **options)


def allowed(target, state):
    """The ranks that a budget may give a layer, straight from its description."""
    top = min(state.rank, target.highest or state.rank, state.highest)
    least = max(target.lowest, state.lowest)
    if state.lowest == state.highest:
        return [min(state.rank, state.lowest)]
    if state.rank <= least:
        return [min(state.rank, state.highest)]
    # Where the two do not meet, the layer's own go before those of the budget.
    return [*range(least, top + 1)] or [min(least, state.highest)]


def cost(model, ranks):
    return sum(model[name].params_per_rank * rank for name, rank in ranks.items())


def energy_of(state, below, above):
    """What the directions from rank ``below`` to rank ``above`` keep of the energy."""
    return float(state.values.square()[below:above].sum())


def kept(target, model, ranks):
    return sum(energy_of(model[name], 0, rank) for name, rank in ranks.items())


@st.composite
def problems(draw, sizes=((5, 5), (5, 8), (20, 9), (7, 6))):
    """(a budget in parameters that pays the lowest ranks, a model of up to 4 layers)."""
    model = {}
    for name in draw(st.permutations("abcd"))[: draw(st.integers(1, 4))]:
        rank = draw(st.integers(1, 5))
        numbers = [float(draw(st.integers(0, 6))) for _ in range(rank)]
        bounds = draw(st.sampled_from([(1, 5), (1, 5), (4, 5), (1, 2), (1, 4), (2, 3), (rank, rank), (1, 1)]))
        model[name] = LayerState(
            rank,
            *draw(st.sampled_from(sizes)),
            *bounds,
            values=torch.tensor(sorted(numbers, reverse=True), dtype=torch.float64),
        )
    lowest = draw(st.integers(1, 3))
    highest = draw(st.one_of(st.none(), st.integers(0, 3).map(lambda more: lowest + more)))
    target = Budget(share=1.0, lowest=lowest, highest=highest, by="weight")
    ends = [allowed(target, state) for state in model.values()]
    least, most = (
        sum(s.params_per_rank * pick(e) for s, e in zip(model.values(), ends, strict=True)) for pick in (min, max)
    )
    return replace(target, share=None, parameters=draw(st.integers(least, most + 3))), model


def best(target, model):
    """The most that any ranks within the budget keep."""
    choices = [allowed(target, state) for state in model.values()]
    ways = (dict(zip(model, way, strict=True)) for way in itertools.product(*choices))
    return max(kept(target, model, way) for way in ways if cost(model, way) <= target.parameters)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_budget_is_never_exceeded_and_less_than_one_step_below_the_best(problem):
    target, model = problem
    ranks = target.ranks(model)
    assert all(rank in allowed(target, model[name]) for name, rank in ranks.items())
    left = target.parameters - cost(model, ranks)
    assert left >= 0
    missed = [0.0]
    for name, rank in ranks.items():
        above = [other for other in allowed(target, model[name]) if other > rank]
        if above and (gain := energy_of(model[name], rank, above[0])):
            # What is left pays for no further step.
            assert (above[0] - rank) * model[name].params_per_rank > left
            missed.append(gain)
    assert best(target, model) - kept(target, model, ranks) <= max(missed) + 1e-9


@settings(max_examples=100, deadline=None)
@given(problems(sizes=[(5, 5)]))
def test_budget_is_spent_best_where_all_steps_cost_the_same(problem):
    target, model = problem
    assert kept(target, model, target.ranks(model)) == pytest.approx(best(target, model))


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(0, 60), st.randoms())
def test_a_larger_budget_keeps_no_less_and_the_order_of_layers_does_not_matter(problem, more, random):
    target, model = problem
    ranks = target.ranks(model)
    larger = replace(target, parameters=target.parameters + more)
    assert kept(larger, model, larger.ranks(model)) >= kept(target, model, ranks) - 1e-9
    names = list(model)
    random.shuffle(names)
    assert target.ranks({name: model[name] for name in names}) == ranks


@settings(deadline=None)
@given(problems(), st.floats(0.01, 1.0))
def test_share_is_of_the_present_parameters_and_keeps_the_lowest_ranks(problem, share):
    target, model = problem
    pool = int(share * sum(state.rank * state.params_per_rank for state in model.values()) + 1e-9)
    least = sum(min(allowed(target, state)) * state.params_per_rank for state in model.values())
    by_share = replace(target, parameters=None, share=share)
    assert by_share.ranks(model) == replace(target, parameters=max(pool, least)).ranks(model)


def test_a_rank_and_bytes_name_the_parameters_of_a_pool():
    model = {"a": layer([3.0, 2.0, 1.0], d_out=150, d_in=50), "b": layer([3.0, 2.0, 1.5], d_out=50, d_in=50)}
    model["pinned"] = replace(model["b"], lowest=3, highest=3)
    assert Budget(final_rank=2).pool(model) == 2 * 200 + 2 * 100 + 3 * 100
    assert Budget(final_rank=2, by="weight").ranks(model) == Budget(parameters=900, by="weight").ranks(model)
    assert Budget(bytes="3600B", by="weight").ranks(model) == Budget(parameters=900, by="weight").ranks(model)


def test_a_share_is_not_lost_to_rounding():
    # In floats 0.58 * 100 is below 58.
    assert Budget(share=0.58).ranks({"layer": layer([1.0] * 50, 1, 1)}) == {"layer": 29}


def test_layers_without_an_update_share_a_budget_alike():
    model = {name: layer([0.0] * 16) for name in "abc"}
    assert Budget(final_rank=4).ranks(model) == {"a": 4, "b": 4, "c": 4}
    model["a"] = layer([1.0] + [0.0] * 15)
    assert Budget(final_rank=4, by="weight").ranks(model) == {"a": 1, "b": 1, "c": 1}


def test_parameters_below_the_lowest_ranks_are_refused():
    model = {"a": layer([1.0] * 4), "b": layer([1.0] * 4)}
    with pytest.raises(ConfigurationError, match=r"budget .*800.* got 799"):
        Budget(parameters=799, lowest=2).ranks(model)
    assert Budget(parameters=800, lowest=2).floor_parameters(model) == 800


def test_lowest_rank_above_what_a_layer_can_have_is_its_highest_rank():
    """PEFT allows a rank of 12 where min(d_in, d_out) is 6; such a layer cannot have the lowest rank, 8."""
    values = torch.ones(12)
    layers = {"wide": LayerState(12, 32, 6, highest=6, values=values), "other": LayerState(12, 32, 32, values=values)}
    ranks = Budget(parameters=2000, lowest=8).ranks(layers)
    assert ranks["wide"] == 6
    assert 8 <= ranks["other"] <= 12
