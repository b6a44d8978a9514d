"""Lightning's averages of the weights: refused where ranks change, and kept through a resume where they stay."""

import pytest
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging

from dynrank.callbacks import AdapterCheckpoint, RankScheduler
from dynrank.errors import ConfigurationError
from dynrank.schedules import Stage
from dynrank.targets import Rank
from dynrank.triggers import At


@pytest.mark.parametrize("average", [EMAWeightAveraging(), StochasticWeightAveraging(1e-2)])
def test_an_average_of_weights_is_refused_where_ranks_change(fit, average):
    with pytest.raises(ConfigurationError, match="averages weights of one rank"):
        fit(average, RankScheduler(Stage(At(step=8), Rank(3))))


def test_an_average_without_the_base_resumes_to_the_bit_at_a_fixed_rank(fit, assert_same, tmp_path):
    def run(**options):
        return fit(EMAWeightAveraging(decay=0.9), RankScheduler([]), saved=tmp_path, kind=AdapterCheckpoint, **options)[
            0
        ]

    whole = run()
    assert_same(run(ckpt_path=tmp_path / "step=12.ckpt"), whole)
