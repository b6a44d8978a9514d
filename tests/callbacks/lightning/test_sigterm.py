"""SIGTERM in training: the step ends, the run is saved, and a resume comes to equal bits; see also the crash matrix."""

import json
import os
import signal
from pathlib import Path

import forked
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from dynrank.callbacks import AdapterCheckpoint, RankScheduler
from dynrank.schedules import Stage
from dynrank.targets import Rank
from dynrank.triggers import Plateau

SCRIPTS = Path(__file__).parents[3] / "scripts"
# The second of two processes gets the signal in its first validation, which follows step 4.
PROGRAM = """
import json, logging, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from crash_matrix import Case, Stop, ends, equal, run

case = Case("plateau and cut, checked", "AdamW", 2, 1)
whole, here = Path("whole"), Path("stopped")
for folder in (whole, here):
    (folder / "saved").mkdir(parents=True)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
assert not any(run(case, whole))
codes = run(case, here, Stop("SIGTERM", "validation", 0, 0.0, 1))
step = torch.load(here / "saved" / "last.ckpt")["global_step"]
resumed = run(case, here)
same = equal([end for end, _ in ends(case, here)], [end for end, _ in ends(case, whole)])
print(json.dumps([codes, step, resumed, same]))
"""


def test_sigterm_in_one_of_two_processes_ends_both_after_the_next_step(tmp_path):
    """Both save the same step, exit with 0, and resume to the bits of a whole run."""
    code, said = forked.run(PROGRAM, SCRIPTS, cwd=tmp_path)
    assert code == 0, said
    assert json.loads(said.splitlines()[-1]) == [[0, 0], 5, [0, 0], True]


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
