"""What every target makes of layers: by hand, within its bounds, and a budget against brute force."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrank.errors import ConfigurationError
from dynrank.targets import (
    Budget,
    EffectiveRank,
    Energy,
    Exactly,
    Factor,
    FinalRanks,
    GrowBy,
    GrowTo,
    LayerState,
    NumericalRank,
    Rank,
    Towards,
)


def layer(rank, values=None, scores=None, **options):
    as_tensor = {
        name: torch.tensor(given, dtype=torch.float64)
        for name, given in (("values", values), ("scores", scores))
        if given is not None
    }
    return LayerState(rank, **{"d_out": 100, "d_in": 100, **as_tensor, **options})


def next_rank(target, state):
    return target.ranks({"layer": state})["layer"]


# By hand


@pytest.mark.parametrize(
    ("target", "rank", "expected"),
    [
        (Rank(8), 16, 8),
        (Rank(8), 8, 8),
        (Rank(8), 4, 4),
        (Exactly(8), 16, 8),
        (Exactly(8), 4, 8),
        (GrowTo(8), 4, 8),
        (GrowTo(8), 16, 16),
        (GrowBy(3), 4, 7),
        (Factor(0.5), 16, 8),
        (Factor(0.5), 7, 4),
        (Factor(0.3), 10, 3),  # 0.3 * 10 is above 3 in floats
        (Factor(0.5, lowest=3), 4, 3),
        (Factor(0.5, lowest=3), 2, 2),
        (Factor(0.5, multiple=4), 10, 8),
        (Factor(0.5, lowest=5, multiple=4), 32, 16),
        (Factor(0.1, lowest=5, multiple=4), 32, 8),  # the least multiple that is not below 5
        (Factor(0.9, multiple=4), 6, 6),  # 8 would be a growth
        (Factor(1.0), 16, 16),
    ],
)
def test_rank_by_hand(target, rank, expected):
    assert next_rank(target, layer(rank)) == expected


@pytest.mark.parametrize(
    ("shape", "ranks"),
    [
        ("geometric", [32, 16, 8]),
        ("linear", [45, 26, 8]),  # 64 - 56/3 = 45.3, then halfway from 45 to 8 = 26.5, to even
        ("cosine", [50, 22, 8]),  # 8 + 56 * 3/4, 8 + 56 * 1/4
    ],
)
def test_towards_goes_all_the_way_in_steps_of_its_shape(shape, ranks):
    rank, way = 64, []
    for step in (1, 2, 3):
        rank = next_rank(Towards(8, step, 3, shape), layer(rank))
        way.append(rank)
    assert way == ranks


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 12), st.sampled_from(["geometric", "linear", "cosine"]))
def test_towards_never_rises_and_ends_at_its_rank(start, end, steps, shape):
    rank, before = start, start
    for step in range(1, steps + 1):
        rank = next_rank(Towards(end, step, steps, shape), layer(rank, highest=400))
        assert min(end, before) <= rank <= before
        before = rank
    assert rank == min(start, end)


@given(st.integers(2, 300), st.integers(1, 300), st.integers(1, 8))
def test_towards_stays_close_to_the_ideal_curve(start, end, steps):
    """Each step starts from the rounded rank of the one before; halves of a rank that shrink from step to step."""
    if end >= start:
        return
    for shape in ("geometric", "linear"):
        rank = start
        for step in range(1, steps + 1):
            rank = next_rank(Towards(end, step, steps, shape), layer(rank, highest=400))
            share = step / steps
            ideal = start * (end / start) ** share if shape == "geometric" else start + (end - start) * share
            left = steps - step
            assert abs(rank - ideal) <= 0.5 * max(1, sum(left / m for m in range(max(1, left), steps))) + 0.1


def test_towards_brings_a_layer_to_its_own_final_rank():
    state = layer(64, lowest=16, final_rank=16)
    assert next_rank(Towards(4, 1, 2), state) == 32
    assert next_rank(Towards(4, 2, 2), replace(state, rank=32)) == 16


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (Energy(16 / 21), 1),  # squares 16, 4, 1, 0: exactly the share
        (Energy(0.77), 2),
        (Energy(20 / 21), 2),
        (Energy(0.96), 3),
        (Energy(1.0), 3),  # nothing is in the fourth
        (Energy(0.5, lowest=2), 2),
        (Energy(0.96, multiple=2), 4),
        (Energy(0.5, lowest=3, multiple=2), 4),
        (NumericalRank(0.1), 3),
        (NumericalRank(0.25), 2),  # 1 is not above a quarter of 4
        (NumericalRank(0.3), 2),
        (NumericalRank(0.6), 1),
        (EffectiveRank(), 3),  # exp(entropy of 4/7, 2/7, 1/7) = 2.60
        (EffectiveRank(multiple=4), 4),
    ],
)
def test_spectrum_by_hand(target, expected):
    assert next_rank(target, layer(4, values=[4.0, 2.0, 1.0, 0.0])) == expected


@pytest.mark.parametrize("ranks", [1, 3, 5])
def test_effective_rank_of_equal_values_is_their_number(ranks):
    assert next_rank(EffectiveRank(), layer(6, values=[2.0] * ranks + [0.0] * (6 - ranks))) == ranks


@pytest.mark.parametrize("target", [Energy(0.9), EffectiveRank(), NumericalRank()])
def test_spectrum_of_a_layer_without_an_update_asks_for_the_least(target):
    zero = layer(8, values=[0.0] * 8)
    assert next_rank(target, zero) == 1
    assert next_rank(replace(target, lowest=3, multiple=2), zero) == 4


def test_final_ranks_go_where_the_rank_map_says_and_nowhere_else():
    states = {"own": layer(16, final_rank=4, lowest=4), "free": layer(16), "there": layer(4, final_rank=4, lowest=4)}
    assert FinalRanks().ranks(states) == {"own": 4, "free": 16, "there": 4}


# What holds for all of them


@st.composite
def states(draw, least_highest=1):
    """A layer as planning makes it: free, with a final rank of its own (last stage or not), or pinned."""
    d_out, d_in = draw(st.integers(least_highest, 40)), draw(st.integers(least_highest, 40))
    most = min(d_out, d_in)
    rank = draw(st.integers(1, most))
    kind = draw(st.sampled_from(["free", "free", "pinned", "own", "own, last"]))
    final_rank = draw(st.integers(1, rank)) if "own" in kind else None
    lowest, highest = {"pinned": (rank, rank), "own, last": (final_rank, final_rank)}.get(kind, (final_rank or 1, most))
    numbers = st.lists(st.floats(0, 100), min_size=rank, max_size=rank)
    values = torch.tensor(sorted(draw(numbers), reverse=True), dtype=torch.float64)
    scores = torch.tensor(draw(numbers), dtype=torch.float64)
    return LayerState(rank, d_out, d_in, lowest, highest, final_rank, values, scores)


COUNTS, SHARES = st.integers(1, 20), st.floats(0.01, 1.0)
BUDGETS = st.builds(
    lambda share, lowest, more, multiple, score: Budget(
        share=share,
        lowest=lowest,
        highest=None if more is None else -(-lowest // multiple) * multiple + more,
        multiple=multiple,
        score=score,
    ),
    SHARES,
    st.integers(1, 6),
    st.one_of(st.none(), st.integers(0, 20)),
    st.integers(1, 5),
    st.sampled_from(["energy", "sensitivity"]),
)
SHRINKING = st.one_of(
    st.builds(Rank, COUNTS),
    st.builds(
        lambda rank, steps, at, shape: Towards(rank, 1 + at % steps, steps, shape),
        COUNTS,
        st.integers(1, 5),
        st.integers(0, 4),
        st.sampled_from(["geometric", "linear", "cosine"]),
    ),
    st.builds(Factor, SHARES, lowest=st.integers(1, 8), multiple=st.integers(1, 5)),
    st.builds(Energy, SHARES, lowest=st.integers(1, 8), multiple=st.integers(1, 5)),
    st.builds(EffectiveRank, lowest=st.integers(1, 8), multiple=st.integers(1, 5)),
    st.builds(NumericalRank, SHARES, lowest=st.integers(1, 8), multiple=st.integers(1, 5)),
    BUDGETS,
    st.just(FinalRanks()),
)
GROWING = st.one_of(st.builds(GrowTo, COUNTS), st.builds(GrowBy, COUNTS))
MODELS = st.lists(states(), min_size=1, max_size=4).map(lambda all_: {f"layer.{i}": s for i, s in enumerate(all_)})


@settings(max_examples=300, deadline=None)
@given(SHRINKING, MODELS)
def test_shrink_never_raises_and_keeps_within_the_bounds(target, model):
    ranks = target.ranks(model)
    assert list(ranks) == list(model)
    for name, state in model.items():
        assert isinstance(ranks[name], int)
        assert 1 <= ranks[name] <= state.rank
        if state.lowest == state.highest:  # pinned, or in the last stage with a final rank of its own
            assert ranks[name] == state.lowest
        assert ranks[name] >= state.lowest


@settings(max_examples=200, deadline=None)
@given(GROWING, MODELS)
def test_growth_never_lowers_and_keeps_within_the_bounds(target, model):
    ranks = target.ranks(model)
    for name, state in model.items():
        assert state.rank <= ranks[name] <= max(state.rank, state.highest)


@given(COUNTS, MODELS)
def test_exactly_keeps_within_the_bounds(rank, model):
    for name, chosen in Exactly(rank).ranks(model).items():
        assert model[name].lowest <= chosen <= model[name].highest
        assert chosen == rank or chosen in (model[name].lowest, model[name].highest)


@settings(max_examples=500, deadline=None)
@given(st.one_of(SHRINKING, GROWING, st.builds(Exactly, COUNTS)), MODELS)
def test_reach_bounds_the_ranks_of_free_layers(target, model):
    free = {name: replace(state, lowest=1, highest=2**31, final_rank=None) for name, state in model.items()}
    low, high = (pick(state.rank for state in free.values()) for pick in (min, max))
    bottom, top = target.reach(low, high)
    for name, rank in target.ranks(free).items():
        assert bottom <= rank <= top, (name, free[name].rank)


@settings(max_examples=300, deadline=None)
@given(SHRINKING, MODELS)
def test_ranks_are_multiples_where_the_bounds_allow(target, model):
    for name, rank in target.ranks(model).items():
        state = model[name]
        lowest = max(state.lowest, getattr(target, "lowest", 1))
        fits = -(-lowest // target.multiple) * target.multiple <= state.rank
        if fits and state.lowest < state.highest and rank < state.rank and rank > state.lowest:
            assert rank % target.multiple == 0


# Budget


def cost(model, ranks):
    return sum(model[name].cost * rank for name, rank in ranks.items())


def worth(model, ranks, score):
    total = 0.0
    for name, rank in ranks.items():
        if score == "energy":
            total += float(model[name].values[:rank].square().sum())
        else:
            total += sum(sorted(model[name].scores.tolist(), reverse=True)[:rank])
    return total


def allowed(target, state):
    """Ranks that a budget may give a layer, straight from its description."""
    top = state.rank if target.highest is None else min(state.rank, target.highest)
    least = max(target.lowest, state.lowest)
    if state.lowest == state.highest:
        return [min(state.rank, state.lowest)]
    if state.rank <= least:
        return [state.rank]
    top = max(least, min(top, state.highest))
    below = [k for k in range(least, min(top, state.rank - 1) + 1) if k % target.multiple == 0]
    return (below + [state.rank] if state.rank <= top else below) or [top]  # a layer may also stay as it is


@st.composite
def small_models(draw):
    def state():
        rank = draw(st.integers(1, 5))
        numbers = [draw(st.integers(0, 6)) / 1.0 for _ in range(rank)]
        options = draw(st.sampled_from([{}, {}, {"lowest": rank, "highest": rank}, {"lowest": 1, "highest": 1}]))
        sizes = draw(st.sampled_from([(5, 5), (5, 8), (20, 9), (7, 6)]))
        return LayerState(
            rank,
            *sizes,
            **{"lowest": 1, "highest": 5, **options},
            values=torch.tensor(sorted(numbers, reverse=True), dtype=torch.float64),
            scores=torch.tensor(numbers, dtype=torch.float64),
        )

    return {f"layer.{i}": state() for i in range(draw(st.integers(1, 4)))}


@settings(max_examples=300, deadline=None)
@given(BUDGETS, small_models(), st.one_of(st.none(), st.floats(0, 1)))
def test_budget_is_respected_exactly_and_shared_out_best(target, model, between):
    choices = [allowed(target, state) for state in model.values()]
    least, most = (sum(s.cost * pick(c) for s, c in zip(model.values(), choices, strict=True)) for pick in (min, max))
    now = sum(state.rank * state.cost for state in model.values())
    if between is not None:  # in parameters
        pool = max(1, round(least + between * (most - least)))
        target = replace(target, share=None, parameters=pool)
    else:
        pool = int(target.share * now + 1e-9)
        pool = max(pool, least)
    if pool < least:
        return
    ranks = target.ranks(model)
    assert all(rank in options for rank, options in zip(ranks.values(), choices, strict=True))
    assert cost(model, ranks) <= pool
    best = max(
        worth(model, dict(zip(model, combination, strict=True)), target.score)
        for combination in itertools.product(*choices)
        if cost(model, dict(zip(model, combination, strict=True))) <= pool
    )
    assert worth(model, ranks, target.score) == pytest.approx(best, rel=1e-12)


def test_budget_by_hand():
    model = {
        "wide": layer(3, values=[3.0, 2.0, 1.0], d_out=150, d_in=50),  # 9, 4, 1 for 200 parameters each
        "narrow": layer(3, values=[2.0, 2.0, 2.0], d_out=50, d_in=50),  # 4, 4, 4 for 100
        "pinned": layer(2, values=[0.0, 0.0], lowest=2, highest=2, d_out=50, d_in=50),
    }
    assert Budget(parameters=200 + 100 + 200).ranks(model) == {"wide": 1, "narrow": 1, "pinned": 2}
    assert Budget(parameters=899).ranks(model) == {"wide": 1, "narrow": 3, "pinned": 2}
    assert Budget(parameters=900).ranks(model) == {"wide": 2, "narrow": 3, "pinned": 2}
    assert Budget(share=900 / 1100).ranks(model) == {"wide": 2, "narrow": 3, "pinned": 2}
    assert Budget(share=1.0).ranks(model) == {"wide": 3, "narrow": 3, "pinned": 2}
    assert Budget(parameters=900, highest=2).ranks(model) == {"wide": 2, "narrow": 2, "pinned": 2}
    assert Budget(share=1.0, multiple=2).ranks(model) == {"wide": 3, "narrow": 3, "pinned": 2}  # none need change
    assert Budget(parameters=1099, multiple=2).ranks(model) == {"wide": 2, "narrow": 3, "pinned": 2}


def test_budget_by_sensitivity_reads_scores_in_any_order():
    model = {"a": layer(2, scores=[0.1, 5.0]), "b": layer(2, scores=[3.0, 4.0])}
    assert Budget(parameters=3 * 200, score="sensitivity").ranks(model) == {"a": 1, "b": 2}


def test_budget_share_is_not_lost_to_rounding():
    model = {"layer": layer(50, values=[1.0] * 50, d_out=1, d_in=1)}
    assert Budget(share=0.58).ranks(model) == {"layer": 29}  # 0.58 * 100 is below 58 in floats


def test_budget_below_the_lowest_ranks_is_refused_and_a_share_below_them_keeps_them():
    model = {"a": layer(4, values=[1.0] * 4), "b": layer(4, values=[1.0] * 4)}
    with pytest.raises(ConfigurationError, match="at least 800, .* got 799"):
        Budget(parameters=799, lowest=2).ranks(model)
    assert Budget(share=0.1, lowest=2).ranks(model) == {"a": 2, "b": 2}  # as a repeated halving ends
    assert Budget(parameters=800, lowest=2).floor_parameters(model) == 800


def test_budget_keeps_a_layer_that_no_multiple_fits():
    model = {"a": layer(6, values=[1.0] * 6), "b": layer(16, values=[1.0] * 16)}
    ranks = Budget(parameters=(6 + 12) * 200, lowest=5, multiple=4).ranks(model)
    assert ranks == {"a": 6, "b": 12}


def test_budget_puts_a_layers_own_bounds_first():
    model = {
        "own": layer(8, values=[1.0] * 8, lowest=5),
        "above": layer(16, values=[1.0] * 16, lowest=8),
    }
    assert Budget(share=1.0, highest=6, multiple=4).ranks(model) == {"own": 6, "above": 8}


# Refusals


@pytest.mark.parametrize("value", [0, -1, 1.5, "4", None, True])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (Rank, "rank"),
        (Towards, "rank"),
        (Exactly, "rank"),
        (GrowTo, "rank"),
        (GrowBy, "count"),
        (lambda v: Factor(0.5, lowest=v), "lowest"),
        (lambda v: Factor(0.5, multiple=v), "multiple"),
        (lambda v: Energy(0.5, lowest=v), "lowest"),
        (lambda v: EffectiveRank(multiple=v), "multiple"),
        (lambda v: NumericalRank(lowest=v), "lowest"),
        (lambda v: Budget(share=0.5, lowest=v), "lowest"),
        (lambda v: Budget(share=0.5, multiple=v), "multiple"),
        (lambda v: Budget(parameters=1, lowest=1, highest=v) if v is not None else Rank(None), "(highest|rank)"),
        (lambda v: Budget(parameters=v or -1) if v is not None else Rank(None), "(parameters|rank)"),
    ],
)
def test_value_that_is_no_count_names_its_key(make, name, value):
    with pytest.raises(ConfigurationError, match=rf"^{name} must be .*schedule\.{name}$"):
        make(value)


@pytest.mark.parametrize("value", [0, -0.1, 1.1, float("nan"), "half", True])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (Factor, "factor"),
        (Energy, "share"),
        (NumericalRank, "tolerance"),
        (lambda v: Budget(share=v), "share"),
    ],
)
def test_value_that_is_no_share_names_its_key(make, name, value):
    with pytest.raises(ConfigurationError, match=rf"^{name} must be a share .*schedule\.{name}$"):
        make(value)


@pytest.mark.parametrize(
    ("make", "keys"),
    [
        (lambda: Budget(), ["schedule.parameters", "schedule.share"]),
        (lambda: Budget(parameters=100, share=0.5), ["schedule.parameters", "schedule.share"]),
        (lambda: Budget(share=0.5, score="magic"), ["magic", "schedule.score"]),
        (lambda: Budget(share=0.5, lowest=5, highest=4), ["highest", "4", "schedule.highest"]),
        (lambda: Budget(share=0.5, lowest=5, highest=7, multiple=4), ["multiple", "5", "7", "schedule.multiple"]),
        (lambda: Towards(4, 1, 1, "bent"), ["bent", "schedule.shape"]),
        (lambda: Towards(4, 3, 2), ["step", "3"]),
    ],
)
def test_values_that_contradict_each_other_name_their_keys(make, keys):
    with pytest.raises(ConfigurationError) as caught:
        make()
    assert all(key in str(caught.value) for key in keys), caught.value


@pytest.mark.parametrize(
    ("target", "highest", "words"),
    [
        (Rank(8), 7, ["rank", "7", "8"]),
        (Towards(8), 7, ["rank", "7", "8"]),
        (Factor(0.5, lowest=8), 7, ["lowest", "7", "8"]),
        (Factor(0.5, multiple=8), 7, ["multiple", "7", "8"]),
        (Energy(0.5, lowest=8), 7, ["lowest", "7", "8"]),
        (Energy(0.5, lowest=5, multiple=4), 7, ["multiple", "4", "5", "7"]),
        (EffectiveRank(multiple=8), 7, ["multiple", "7", "8"]),
        (NumericalRank(lowest=8), 7, ["lowest", "7", "8"]),
        (Budget(share=0.5, lowest=8), 7, ["lowest", "7", "8"]),
        (Budget(share=0.5, multiple=8), 7, ["multiple", "7", "8"]),
        (Budget(share=0.5, lowest=5, multiple=4, highest=8), 7, ["multiple", "4", "5", "7"]),
        (GrowTo(8), 9, ["rank", "8", "9"]),
    ],
)
def test_fault_says_what_contradicts_the_ranks_at_the_start(target, highest, words):
    fault = target.fault(highest)
    assert fault is not None
    assert all(word in fault for word in words), fault


@pytest.mark.parametrize(
    ("target", "highest"),
    [
        (Rank(8), 8),
        (Towards(8), 8),
        (Towards(8, 2, 2), 4),  # the step before has been there
        (Factor(0.5, lowest=8, multiple=8), 8),
        (Energy(0.5, lowest=5, multiple=4), 8),
        (Budget(share=0.5, lowest=5, multiple=4, highest=8), 8),
        (GrowTo(8), 8),
        (GrowBy(1), 8),
        (Exactly(4), 8),
        (Exactly(16), 8),
        (FinalRanks(), 1),
    ],
)
def test_fault_is_none_where_nothing_contradicts(target, highest):
    assert target.fault(highest) is None
