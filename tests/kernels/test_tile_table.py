"""Which bucket serves a rank."""

import pytest

from dynrank.kernels.tile_table import rank_bucket


def test_rank_bucket_is_the_least_that_holds_the_rank():
    buckets = {1: 16, 16: 16, 17: 32, 64: 64, 65: 128, 128: 128}
    assert {rank: rank_bucket(rank) for rank in buckets} == buckets
    with pytest.raises(ValueError, match="rank must be at most 128, got 129"):
        rank_bucket(129)
