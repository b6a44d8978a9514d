"""SIGTERM in training: the step ends, the run is saved, and a resume comes to equal bits; see also the crash matrix."""

import os
import signal

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from dynrank.callbacks import AdapterCheckpoint, RankScheduler
from dynrank.schedules import Stage
from dynrank.targets import Rank
from dynrank.triggers import Plateau


# Lightning gives advice about small data.
@pytest.mark.filterwarnings("ignore")
def test_sigterm_in_a_validation_ends_the_run_after_the_next_step(fit, regression, assert_same, tmp_path):
    def schedule():
        return RankScheduler(Stage(Plateau("val/loss", patience=1, warmup_steps=0), Rank(3), deadline=0.9))

    before = signal.getsignal(signal.SIGTERM)
    whole, _ = fit(schedule(), AdapterCheckpoint(tmp_path / "whole"))
    assert signal.getsignal(signal.SIGTERM) is before
    stopped = regression[0]()
    seen = []
    step = stopped.validation_step

    def told_to_end(batch, batch_idx):
        seen.append(batch_idx)
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(batch, batch_idx)

    stopped.validation_step = told_to_end
    with pytest.raises(SIGTERMException):
        fit(schedule(), AdapterCheckpoint(tmp_path), module=stopped)
    # The third validation, after step 15, is complete.
    assert len(seen) == 6
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 16
    resumed, _ = fit(schedule(), AdapterCheckpoint(tmp_path), ckpt_path=tmp_path / "last.ckpt")
    assert_same(resumed, whole)
