"""Checkpoint files: whole or not there, whoever kills the writer; what is damaged is not read."""

import os
import signal
import time

import forked
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_flatten

from dynrank.errors import ConfigurationError
from dynrank.output.checkpoint_file import read_checkpoint, write_checkpoint

CHECKPOINT = {
    "state_dict": {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.ones(2, dtype=torch.bfloat16),
        "_extra": {"x": None},
    },
    "loops": {"fit": {"step": 3, "done": (True, 0.5)}},
    "optimizer_states": [{0: {"exp_avg": torch.full((3,), 2.0)}}],
}


def same(one, other):
    ours, form = tree_flatten(one)
    theirs, other_form = tree_flatten(other)
    return form == other_form and all(
        type(a) is type(b) and (torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b)
        for a, b in zip(ours, theirs, strict=True)
    )


def test_what_was_written_is_read(tmp_path):
    write_checkpoint(CHECKPOINT, tmp_path / "new" / "a.ckpt")
    assert same(read_checkpoint(tmp_path / "new" / "a.ckpt"), CHECKPOINT)
    assert same(torch.load(tmp_path / "new" / "a.ckpt", weights_only=True), CHECKPOINT)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.ckpt"]


PROGRAM = """
import torch
from dynrank.output.checkpoint_file import write_checkpoint
write_checkpoint({"state_dict": {"a": torch.zeros(1000)}}, "a.ckpt")
while True:
    write_checkpoint({"state_dict": {"a": torch.full((2_000_000,), 1.0)}}, "a.ckpt")
"""


def test_a_writer_killed_in_the_middle_leaves_a_whole_file(tmp_path):
    child = forked.start(PROGRAM, cwd=tmp_path)
    file = tmp_path / "a.ckpt"
    while child.is_alive() and not file.exists():
        time.sleep(0.01)
    # The child has to be stopped while the file that it writes is there.
    for _ in range(10**7):
        os.kill(child.pid, signal.SIGSTOP)
        if [*tmp_path.glob("*.part")]:
            break
        os.kill(child.pid, signal.SIGCONT)
    child.kill()
    assert forked.end([child]) == [-signal.SIGKILL]
    assert [*tmp_path.glob("a.ckpt.*.part")]
    assert read_checkpoint(file)["state_dict"]["a"].numel() in (1000, 2_000_000)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_an_error_that_leaves_the_earlier_file(tmp_path):
    write_checkpoint(CHECKPOINT, tmp_path / "a.ckpt")
    with pytest.raises(ConfigurationError, match=r"cannot write the checkpoint .*a\.ckpt.*File too large"):
        write_checkpoint({"state_dict": {"a": torch.zeros(10**5)}}, tmp_path / "a.ckpt")
    assert same(read_checkpoint(tmp_path / "a.ckpt"), CHECKPOINT)
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize("content", [b"", b"\x80\x02}q\x00.", {"state_dict": 3}])
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    if isinstance(content, bytes):
        (tmp_path / "a.ckpt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ConfigurationError, match=r"a\.ckpt.*ckpt_path"):
        read_checkpoint(tmp_path / "a.ckpt")


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
    assert same(found, CHECKPOINT)
