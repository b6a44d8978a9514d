"""Damaged checkpoints, rank maps and configurations at the commands: a result, or one message and exit code 2.

More examples than in the suite: ``DYNRANK_EXAMPLES=200 pytest tests/run/test_damaged_input.py``. Damaged adapters are
in ``tests/adapters/test_damaged.py``.
"""

import os
import shutil
import warnings
from itertools import count

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import dynrank
from dynrank import train
from dynrank.commands import cli
from dynrank.run import job

pytestmark = pytest.mark.filterwarnings("ignore")

MORE = os.environ.get("DYNRANK_EXAMPLES")
FOLDERS = count()
VALUES = ["null", "true", "-1", "0", "1e400", "nan", "text", "''", "[]", "[1,a]", "{}", "{a:1}", "1.5", "99999999999"]
RULES = r"""rank_pattern:
  query: 4
  'layer\.[01]\.output.*': {rank: 4, final_rank: 2, alpha: 8}
  bert.pooler.dense: {rank: 3, pinned: true}
"""


def examples(number):
    return settings(
        max_examples=int(MORE or number),
        deadline=None,
        derandomize=MORE is None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@pytest.fixture(scope="module")
def run(tiny_bert, tmp_path_factory):
    """(overrides of a run of four steps, its last checkpoint, made after its drop)."""
    overrides = ["debug=smoke", f"task.model={tiny_bert}", "lora.rank=6", "schedule.final_rank=2", "task.limit=32"]
    overrides += ["trainer.max_steps=4", "optimizer.warmup_steps=1", "trainer.enable_progress_bar=false", "plots=false"]
    folder = tmp_path_factory.mktemp("run") / "run"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        job.run(dynrank.compose(overrides), folder)
    return overrides, folder / "checkpoints" / "last.ckpt"


def go_on(launch, run):
    """Exit code of ``dynrank-train`` from damaged.ckpt; what it refuses leaves no adapter."""
    folder = f"run{next(FOLDERS)}"
    code, _, said = launch(train.main, *run[0], f"hydra.run.dir={folder}", "ckpt_path=damaged.ckpt")
    assert code == 0 or "checkpoint" in said or "ckpt_path" in said, said
    assert os.path.exists(f"{folder}/adapter") == (code == 0)
    shutil.rmtree(folder, ignore_errors=True)
    assert code in (0, 2)
    return code


@examples(10)
@given(data=st.data())
def test_checkpoint_of_damaged_bytes(launch, run, tmp_path, data):
    content = bytearray(run[1].read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    for at in data.draw(st.lists(st.integers(0, len(content)), min_size=1, max_size=4)):
        if at < len(content):
            content[at] ^= data.draw(st.integers(1, 255))
    (tmp_path / "damaged.ckpt").write_bytes(content)
    go_on(launch, run)


class Trap:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_code_in_a_checkpoint_is_not_run(launch, run, tmp_path):
    torch.save({**torch.load(run[1]), "extra": Trap(tmp_path / "trapped")}, tmp_path / "damaged.ckpt")
    assert go_on(launch, run) == 2
    assert not (tmp_path / "trapped").exists()
    torch.load(tmp_path / "damaged.ckpt", weights_only=False)["extra"].close()  # the trap is live
    assert (tmp_path / "trapped").exists()


@examples(16)
@given(data=st.data())
def test_rank_map_of_damaged_bytes(launch, run, tmp_path, data):
    content = bytearray(RULES.encode())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
        content[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b"{}[]:'\"&*!|>%@ \n-#0")))
    length = data.draw(st.just(len(content)) | st.integers(0, len(content)))
    (tmp_path / "rules.yaml").write_bytes(content[:length])
    assert launch(cli.main, "ranks", *run[0], "rank_map.file=rules.yaml")[0] in (0, 2)


def keys_of(node, path=""):
    for key, value in node.items():
        inner = f"{path}.{key}" if path else str(key)
        yield inner
        if isinstance(value, dict):
            yield from keys_of(value, inner)


@examples(20)
@given(data=st.data())
def test_configuration_value(launch, run, data):
    schedules = [[], ["schedule=anneal"], ["schedule=one_stage"], ["schedule=budget"], ["schedule=milestones"]]
    extra = data.draw(st.sampled_from(schedules))
    overrides = [text for text in run[0] if not (extra and text.startswith("schedule."))] + extra
    keys = sorted(set(keys_of(OmegaConf.to_container(dynrank.compose(overrides)))) - {"task.model"})
    key = data.draw(st.sampled_from(keys))
    override = data.draw(st.sampled_from([f"{key}={value}" for value in VALUES] + [f"~{key}", f"{key}x=1"]))
    assert launch(cli.main, "ranks", *overrides, override)[0] in (0, 2)


@pytest.mark.parametrize(
    "override",
    ["schedule.drops=99999999999", "seed=99999999999", "trainer.max_steps=null", "trainer.max_steps=1e400"],
)
def test_value_without_measure_is_refused_at_once(launch, run, override):
    code, _, said = launch(cli.main, "ranks", *run[0], override)
    assert code == 2
    assert override.partition("=")[0] in said
