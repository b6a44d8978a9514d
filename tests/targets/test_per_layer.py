"""Targets of each layer separately, by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynrank.targets import Energy, LayerState, Rank, Towards


def next_rank(target, rank, **options):
    return target.ranks({"layer": LayerState(rank, **options)})["layer"]


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 12))
def test_towards_never_rises_stays_close_to_its_curve_and_ends_at_its_rank(start, end, steps):
    rank = start
    for step in range(1, steps + 1):
        rank, before = next_rank(Towards(end, step, steps), rank), rank
        assert min(end, before) <= rank <= before
        if end < start:
            ideal = start * (end / start) ** (step / steps)
            left = steps - step
            # each step starts from the rounded rank of the one before; that half of a rank shrinks from step to step
            assert abs(rank - ideal) <= 0.5 * max(1, sum(left / m for m in range(max(1, left), steps))) + 0.1
    assert rank == min(start, end)


def test_a_layer_with_a_final_rank_of_its_own_goes_there():
    own = {"lowest": 16, "final_rank": 16}
    assert next_rank(Towards(4, 1, 2), 64, **own) == 32
    assert next_rank(Towards(4, 2, 2), 32, **own) == 16
    assert next_rank(Rank(4), 64, **own) == 16


@pytest.mark.parametrize(
    ("target", "values", "expected"),
    [
        # The squares are 16, 4, 1 and 0, so two values hold exactly the share.
        (Energy(20 / 21), [4.0, 2.0, 1.0, 0.0], 2),
        (Energy(0.5, lowest=2), [4.0, 2.0, 1.0, 0.0], 2),
        (Energy(0.9), [0.0] * 8, 1),
        (Energy(0.9, lowest=3), [0.0] * 8, 3),
    ],
)
def test_rank_from_the_singular_values(target, values, expected):
    assert next_rank(target, len(values), values=torch.tensor(values, dtype=torch.float64)) == expected
