"""SIGTERM in training: the step ends, the run is saved, the process exits with 0, and a resume comes to equal bits."""

import json
import signal
from pathlib import Path

import forked
import pytest

from dynrank.callbacks import AdapterCheckpoint

SCRIPTS = Path(__file__).parents[3] / "scripts"
CASES = [  # (moment, how many pass before, step that is saved)
    ("inside a step", 5, 6),  # the step ends first
    ("decided, not made", 1, 10),  # the last batch of an epoch, between the decision and the change
    ("validation", 6, 12),  # in one that checks the change made after step 11: the change and a step end first
]
PROGRAM = """
import json, logging, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from crash_matrix import Stop, ends, equal, run
from crash_runs import Case

def folder(name):
    Path(name, "disk").mkdir(parents=True)
    return Path(name)

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
case = Case("plateau and cut, checked", "AdamW", 1, "AdapterCheckpoint", 1)
assert run(case, folder("whole")) == [0]
for index, (moment, number, _) in enumerate(json.loads(sys.argv[1])):
    here = folder(str(index))
    code = run(case, here, Stop("SIGTERM", moment, number, 0.0, 0, 0))
    files = sorted(path.name for path in (here / "disk").iterdir())
    step = torch.load(here / "disk" / "last.ckpt")["global_step"]
    resumed = run(case, here)
    same = equal(ends(case, here)[0][0], ends(case, Path("whole"))[0][0])
    print(json.dumps({"code": code, "files": files, "step": step, "resumed": resumed, "same": same}), flush=True)
"""


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    code, said = forked.run(PROGRAM, json.dumps(CASES), SCRIPTS, cwd=tmp_path_factory.mktemp("runs"))
    assert code == 0, said
    return [json.loads(line) for line in said.splitlines()]


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: " ".join(map(str, CASES[index])))
def test_sigterm_ends_the_step_saves_and_exits_0(ends, index):
    step = CASES[index][2]
    assert ends[index] == {"code": [0], "files": ["last.ckpt"], "step": step, "resumed": [0], "same": True}


@pytest.mark.filterwarnings("ignore")  # Lightning's advice about small data
def test_after_training_sigterm_is_what_it_was_before(regression, tmp_path):
    make, data, trainer = regression
    before = signal.getsignal(signal.SIGTERM)
    trainer(max_steps=3, callbacks=[AdapterCheckpoint(tmp_path)], enable_checkpointing=True).fit(make(), *data())
    assert signal.getsignal(signal.SIGTERM) is before
