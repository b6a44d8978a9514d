"""Targets that raise ranks or set them, by hand."""

import pytest

from dynrank.targets import Exactly, GrowBy, GrowTo, LayerState


@pytest.mark.parametrize(
    ("target", "rank", "expected"),
    [
        (GrowTo(8), 4, 8),
        (GrowTo(8), 16, 16),
        (GrowTo(99), 4, 20),
        (GrowBy(3), 4, 7),
        (GrowBy(3), 18, 20),
        (Exactly(8), 16, 8),
        (Exactly(8), 4, 8),
        (Exactly(99), 4, 20),
    ],
)
def test_rank_from_the_rank_now(target, rank, expected):
    assert target.ranks({"layer": LayerState(rank, highest=20)}) == {"layer": expected}
