"""Targets of each layer separately, by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynrank.errors import ConfigurationError
from dynrank.targets import Energy, GrowTo, LayerState, Rank, Towards


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
