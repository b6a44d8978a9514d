"""Which row and bucket serve a GPU and a rank, and that every tile is one the kernels take."""

import pytest

from dynrank.kernels import tile_table


def test_rank_bucket_is_the_least_that_holds_the_rank():
    buckets = {1: 16, 16: 16, 17: 32, 64: 64, 65: 128, 128: 128}
    assert {rank: tile_table.rank_bucket(rank) for rank in buckets} == buckets
    with pytest.raises(ValueError, match="rank must be at most 128, got 129"):
        tile_table.rank_bucket(129)


def test_architecture_row_names_the_row_of_the_gpu():
    rows = {75: None, 80: "sm_80", 89: "sm_80", 90: "sm_90", 100: "sm_100", 103: "sm_100", 120: "sm_80"}
    assert {number: tile_table.architecture_row("cuda", number) for number in rows} == rows
    assert tile_table.architecture_row("hip", "gfx942") is None


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("architecture", tile_table.MULTIPROCESSORS)
@pytest.mark.parametrize("kernel", ["shrink", "expand", "grad_A"])
def test_every_bucket_has_a_tile_with_the_masks_sub_tiles(architecture, itemsize, kernel):
    for bucket in tile_table.BUCKETS:
        assert tile_table.tile(architecture, itemsize, kernel, bucket) is not None
        dropped = tile_table.tile(architecture, itemsize, f"{kernel}+drop", bucket)
        assert (dropped.sub, dropped.slices) in [(32, 4), (32, 8)]
