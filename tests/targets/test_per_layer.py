"""Targets of each layer separately: bounds, steps by equal factors, ranks by name, and wrong values of all targets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrank.errors import ConfigurationError
from dynrank.targets import Budget, Energy, GrowTo, LayerState, Rank, Towards

COUNTS = st.integers(1, 20)


@st.composite
def states(draw):
    """A layer as planning makes it: free, with a final rank of its own (last stage or not), or pinned."""
    d_out = draw(st.integers(1, 40))
    d_in = draw(st.integers(1, 40))
    most = min(d_out, d_in)
    rank = draw(st.integers(1, most))
    kind = draw(st.sampled_from(["free", "free", "pinned", "own", "own, last"]))
    final_rank = draw(st.integers(1, rank)) if "own" in kind else None
    lowest, highest = {"pinned": (rank, rank), "own, last": (final_rank, final_rank)}.get(kind, (final_rank or 1, most))
    numbers = st.lists(st.floats(0, 100), min_size=rank, max_size=rank)
    values = torch.tensor(sorted(draw(numbers), reverse=True), dtype=torch.float64)
    return LayerState(rank, d_out, d_in, lowest, highest, final_rank, values)


SHRINKING = st.one_of(
    st.builds(Rank, COUNTS),
    st.builds(
        lambda rank, steps, at: Towards(rank, 1 + at % steps, steps), COUNTS, st.integers(1, 5), st.integers(0, 4)
    ),
    st.builds(Energy, st.floats(0.01, 1.0), lowest=st.integers(1, 8)),
)
MODELS = st.lists(states(), min_size=1, max_size=4).map(lambda all_: {f"layer.{i}": s for i, s in enumerate(all_)})


@settings(max_examples=150, deadline=None)
@given(SHRINKING, MODELS)
def test_a_shrink_never_raises_and_keeps_bounds(target, model):
    ranks = target.ranks(model)
    assert list(ranks) == list(model)
    for name, state in model.items():
        rank = ranks[name]
        assert isinstance(rank, int)
        assert state.lowest <= rank <= state.rank
        # Such a layer is pinned, or it is in the last stage and has a final rank of its own.
        if state.lowest == state.highest:
            assert rank == state.lowest


@settings(max_examples=100, deadline=None)
@given(st.builds(GrowTo, COUNTS), MODELS)
def test_a_growth_never_lowers_and_stays_within_the_bounds(target, model):
    grown = target.ranks(model)
    for name, state in model.items():
        assert grown[name] == max(state.rank, min(target.rank, state.highest))


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 12))
def test_towards_never_rises_stays_close_to_its_curve_and_ends_at_its_rank(start, end, steps):
    rank = start
    for step in range(1, steps + 1):
        before = rank
        rank = Towards(end, step, steps).ranks({"layer": LayerState(rank)})["layer"]
        assert min(end, before) <= rank <= before
        if end < start:
            ideal = start * (end / start) ** (step / steps)
            left = steps - step
            # each step starts from the rounded rank of the one before; that half of a rank shrinks from step to step
            assert abs(rank - ideal) <= 0.5 * max(1, sum(left / m for m in range(max(1, left), steps))) + 0.1
    assert rank == min(start, end)


def test_a_layer_with_a_final_rank_of_its_own_goes_there_by_equal_factors():
    assert Towards(4, 1, 2).ranks({"own": LayerState(64, lowest=16, final_rank=16)}) == {"own": 32}


BLOCK = ["h.0.attn.q", "h.0.mlp.up", "h.1.attn.q", "h.1.mlp.up", "head"]


def test_one_stage_gives_each_kind_of_layers_its_rank_and_leaves_the_others():
    layers = {name: LayerState(16) for name in BLOCK} | {
        "h.1.mlp.up": LayerState(2),
        "h.1.attn.q": LayerState(16, lowest=16, highest=16),
    }
    assert list(Rank({"attention": 8, "mlp": 4}).ranks(layers).values()) == [8, 4, 16, 2, 16]
    assert list(GrowTo({"mlp": 20, "head": 18}).ranks(layers).values()) == [16, 20, 16, 20, 18]


@pytest.mark.parametrize("rank", [{}, {"mlp": 0}, {"mlp": True}, {"": 4}, {4: 4}, 0, "4"])
def test_what_is_no_rank_is_refused_by_value(rank):
    with pytest.raises(ConfigurationError, match="rank"):
        Rank(rank)


def test_a_key_that_means_no_layer_is_named_with_the_nearest():
    with pytest.raises(ConfigurationError, match=r"'attn\.k' matches no LoRA layer; nearest: \['attn\.q'"):
        Rank({"attn.k": 4}).ranks({name: LayerState(16) for name in BLOCK})


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Rank(0), ["rank", "0"]),
        (lambda: GrowTo(1.5), ["rank", "1.5"]),
        (lambda: Energy(float("nan")), ["share", "nan"]),
        (lambda: Energy(0.5, lowest=0), ["lowest", "0"]),
        (lambda: Budget(parameters=-1), ["parameters", "-1"]),
        (lambda: Budget(parameters=100, share=0.5), ["100", "0.5", "parameters", "share"]),
        (lambda: Budget(share=0.5, lowest=8, highest=7), ["lowest", "8", "7", "highest"]),
        (lambda: Towards(4, 3, 2), ["step", "3", "2"]),
    ],
)
def test_wrong_values_are_named_with_their_key(make, names):
    with pytest.raises(ConfigurationError) as caught:
        make()
    assert all(name in str(caught.value) for name in names), caught.value
