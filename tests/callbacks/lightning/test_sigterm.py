"""SIGTERM in training: the step ends, the run is saved, the process exits with 0, and a resume comes to equal bits."""

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
# Each is (processes, moment, how many pass before, step that is saved).
CASES = [
    (1, "inside a step", 5, 6),
    # A validation has two batches and comes every 4 steps, so this one follows step 16.
    (1, "validation", 6, 17),
    # Both end after the next step, although one of the two has heard nothing.
    (2, "validation", 0, 5),
    (1, "after the last step", 0, 30),
]
PROGRAM = """
import json, logging, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from crash_matrix import Case, Stop, ends, equal, run

def folder(name):
    Path(name, "saved").mkdir(parents=True)
    return Path(name)

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
for index, (processes, moment, number, _) in enumerate(json.loads(sys.argv[1])):
    case, here = Case("plateau and cut, checked", "AdamW", processes, 1), folder(str(index))
    whole = Path(f"whole{processes}")
    if not whole.exists():
        assert not any(run(case, folder(whole)))
    code = run(case, here, Stop("SIGTERM", moment, number, 0.0, processes - 1))
    files = sorted(path.name for path in (here / "saved").iterdir())
    step = torch.load(here / "saved" / "last.ckpt")["global_step"]
    resumed = run(case, here)
    same = equal([end for end, _ in ends(case, here)], [end for end, _ in ends(case, whole)])
    print(json.dumps({"code": code, "files": files, "step": step, "resumed": resumed, "same": same}), flush=True)
"""


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    code, said = forked.run(PROGRAM, json.dumps(CASES), SCRIPTS, cwd=tmp_path_factory.mktemp("runs"))
    assert code == 0, said
    return [json.loads(line) for line in said.splitlines()]


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: " ".join(map(str, CASES[index])))
def test_sigterm_ends_the_step_saves_and_exits_0(ends, index):
    processes, *_, step = CASES[index]
    codes = [0] * processes
    assert ends[index] == {"code": codes, "files": ["last.ckpt"], "step": step, "resumed": codes, "same": True}


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
