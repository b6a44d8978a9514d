"""Checkpoint files: whole or not there, whoever kills the writer; what is damaged is not read."""

import re
import signal
from functools import partial
from pathlib import Path

import forked
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from dynrank.app.runs.overrides import usage_errors
from dynrank.errors import ConfigurationError
from dynrank.output.checkpoint_file import read_checkpoint, write_checkpoint

CHECKPOINT = {
    "state_dict": {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.ones(2, dtype=torch.bfloat16),
    },
    "loops": {"fit": {"step": 3, "done": (True, 0.5)}},
    "optimizer_states": [{0: {"exp_avg": torch.full((3,), 2.0)}}],
}


equal = partial(assert_close, rtol=0, atol=0)


def test_what_was_written_is_read(tmp_path):
    write_checkpoint(CHECKPOINT, tmp_path / "new" / "a.ckpt")
    equal(read_checkpoint(tmp_path / "new" / "a.ckpt"), CHECKPOINT)
    equal(torch.load(tmp_path / "new" / "a.ckpt", weights_only=True), CHECKPOINT)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.ckpt"]


# The system kills a process that writes past a limit, if it does not ignore the signal.
PROGRAM = """
import resource, signal, torch
from dynrank.output.checkpoint_file import write_checkpoint
write_checkpoint({"state_dict": {"a": torch.zeros(10)}}, "a.ckpt")
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
write_checkpoint({"state_dict": {"a": torch.ones(10**5)}}, "a.ckpt")
"""


def test_a_writer_killed_in_the_middle_leaves_a_whole_file(tmp_path):
    assert forked.run(PROGRAM, cwd=tmp_path)[0] == -signal.SIGXFSZ
    assert [file.stat().st_size for file in tmp_path.glob("a.ckpt.*.part")] == [4096]
    assert torch.equal(read_checkpoint(tmp_path / "a.ckpt")["state_dict"]["a"], torch.zeros(10))


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_a_failure_that_leaves_the_earlier_file(tmp_path, capsys):
    write_checkpoint(CHECKPOINT, tmp_path / "a.ckpt")
    with pytest.raises(SystemExit) as ended, usage_errors():
        write_checkpoint({"state_dict": {"a": torch.zeros(10**5)}}, tmp_path / "a.ckpt")
    assert ended.value.code == 1
    assert re.search(r"cannot write the checkpoint .*a\.ckpt.*File too large", capsys.readouterr().err)
    equal(read_checkpoint(tmp_path / "a.ckpt"), CHECKPOINT)
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_what_is_no_checkpoint_is_refused(tmp_path):
    torch.save({"state_dict": 3}, tmp_path / "a.ckpt")
    with pytest.raises(ConfigurationError, match=r"a\.ckpt.*no state_dict$") as caught:
        read_checkpoint(tmp_path / "a.ckpt")
    assert caught.value.arguments == ("ckpt_path",)


class Trap:
    def __reduce__(self):
        return open, ("trapped", "w")


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "extra": Trap()}, "trap.ckpt")
    with pytest.raises(ConfigurationError, match="not a complete checkpoint of plain tensors"):
        read_checkpoint("trap.ckpt")
    assert not Path("trapped").exists()
    # The trap works where its file is trusted.
    torch.load("trap.ckpt", weights_only=False)["extra"].close()
    assert Path("trapped").exists()


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "a.ckpt"
    write_checkpoint(CHECKPOINT, path)
    return path.read_bytes()


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_noticed_or_changes_nothing(tmp_path, content, data):
    if data.draw(st.booleans()):
        broken = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        broken = bytearray(content)
        for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
            broken[at] ^= data.draw(st.integers(1, 255))
    (tmp_path / "a.ckpt").write_bytes(broken)
    try:
        found = read_checkpoint(tmp_path / "a.ckpt")
    except ConfigurationError:
        return
    # A fault between the records, for instance, changes nothing that is read.
    equal(found, CHECKPOINT)
