"""SIGTERM in training: the step ends, the run is saved, the process exits with 0, and a resume comes to equal bits."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dynrank.callbacks import AdapterCheckpoint

SCRIPTS = Path(__file__).parents[3] / "scripts"
CASES = [  # (moment, how many pass before, step that is saved)
    ("inside a step", 5, 6),  # the step ends first
    ("step", 9, 10),  # the last batch of an epoch, between the decision and the change
    ("validation", 6, 12),  # in one that checks the change made after step 11: the change and a step end first
]
PROGRAM = """
import json, logging, os, signal, sys
from functools import partial
from pathlib import Path
import torch
from crash_matrix import equal, forked, train

def ended(work):
    return os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1])

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
assert ended(partial(train, Path("whole"))) == 0
for index, (moment, number, _) in enumerate(json.loads(sys.argv[1])):
    folder = Path(str(index))
    code = ended(partial(train, folder, moment, number, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    files = sorted(path.name for path in folder.iterdir())
    step = torch.load(folder / "last.ckpt")["global_step"]
    resumed = ended(partial(train, folder))
    same = equal(torch.load(folder / "end.pt"), torch.load("whole/end.pt"))
    print(json.dumps({"code": code, "files": files, "step": step, "resumed": resumed, "same": same}), flush=True)
"""


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(CASES)],
        capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path_factory.mktemp("runs"),
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{SCRIPTS}:{SCRIPTS.parent}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: " ".join(map(str, CASES[index])))
def test_sigterm_ends_the_step_saves_and_exits_0(ends, index):
    step = CASES[index][2]
    assert ends[index] == {"code": 0, "files": ["last.ckpt"], "step": step, "resumed": 0, "same": True}


@pytest.mark.filterwarnings("ignore")  # Lightning's advice about small data
def test_after_training_sigterm_is_what_it_was_before(regression, tmp_path):
    make, data, trainer = regression
    before = signal.getsignal(signal.SIGTERM)
    trainer(max_steps=3, callbacks=[AdapterCheckpoint(tmp_path)], enable_checkpointing=True).fit(make(), *data())
    assert signal.getsignal(signal.SIGTERM) is before
