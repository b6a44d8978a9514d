"""What holds for every target: bounds, and wrong values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrank.errors import ConfigurationError
from dynrank.targets import Budget, Energy, GrowTo, LayerState, Rank, Towards

COUNTS = st.integers(1, 20)
SHARES = st.floats(0.01, 1.0)


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
    cap = draw(st.one_of(st.none(), COUNTS))
    return LayerState(rank, d_out, d_in, lowest, highest, final_rank, values, cap=cap)


BUDGETS = st.builds(
    lambda share, lowest, more: Budget(share=share, lowest=lowest, highest=None if more is None else lowest + more),
    SHARES,
    st.integers(1, 6),
    st.one_of(st.none(), st.integers(0, 20)),
)
SHRINKING = st.one_of(
    st.builds(Rank, COUNTS),
    st.builds(
        lambda rank, steps, at: Towards(rank, 1 + at % steps, steps), COUNTS, st.integers(1, 5), st.integers(0, 4)
    ),
    st.builds(Energy, SHARES, lowest=st.integers(1, 8)),
    BUDGETS,
)
GROWING = st.builds(GrowTo, COUNTS)
MODELS = st.lists(states(), min_size=1, max_size=4).map(lambda all_: {f"layer.{i}": s for i, s in enumerate(all_)})


@settings(max_examples=300, deadline=None)
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


@settings(max_examples=200, deadline=None)
@given(GROWING, MODELS)
def test_a_growth_never_lowers_and_stays_within_the_bounds(target, model):
    grown = target.ranks(model)
    for name, state in model.items():
        assert grown[name] == max(state.rank, min(target.rank, state.highest))


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
