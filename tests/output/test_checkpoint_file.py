"""Checkpoint files: whole or not there, whoever kills the writer; what is damaged is not read."""

import os
import pickle
import resource
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def test_what_was_written_is_read(tmp_path):
    write_checkpoint(CHECKPOINT, tmp_path / "new" / "a.ckpt")
    assert same(read_checkpoint(tmp_path / "new" / "a.ckpt"), CHECKPOINT)
    assert same(torch.load(tmp_path / "new" / "a.ckpt", weights_only=True), CHECKPOINT)
    (tmp_path / "new" / "a.ckpt.part").write_bytes(b"left by a killed writer")
    write_checkpoint(CHECKPOINT, tmp_path / "new" / "a.ckpt")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.ckpt"]


PROGRAM = """
import os, sys, torch
from dynrank.output.checkpoint_file import write_checkpoint
write_checkpoint({"state_dict": {"a": torch.zeros(1000)}}, "a.ckpt")
print("first", flush=True)
while True:
    write_checkpoint({"state_dict": {"a": torch.full((2_000_000,), 1.0)}}, "a.ckpt")
"""


def test_a_writer_killed_in_the_middle_leaves_a_whole_file(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert child.stdout.readline() == b"first\n"
        part = tmp_path / "a.ckpt.part"
        for _ in range(10**7):  # stopped while the file that it writes is there
            child.send_signal(signal.SIGSTOP)
            if part.exists():
                break
            child.send_signal(signal.SIGCONT)
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    assert part.exists()
    state = read_checkpoint(tmp_path / "a.ckpt")["state_dict"]
    assert state["a"].numel() in (1000, 2_000_000)


def test_a_full_disk_is_an_error_that_leaves_the_earlier_file(tmp_path):
    write_checkpoint(CHECKPOINT, tmp_path / "a.ckpt")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(ConfigurationError, match=r"cannot write the checkpoint .*a\.ckpt.*File too large"):
            write_checkpoint({"state_dict": {"a": torch.zeros(10**5)}}, tmp_path / "a.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert same(read_checkpoint(tmp_path / "a.ckpt"), CHECKPOINT)
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_code_in_a_file_is_not_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trapped"), "w"))

    torch.save({**CHECKPOINT, "hyper_parameters": Trap()}, tmp_path / "a.ckpt")
    with (tmp_path / "b.ckpt").open("wb") as file:
        pickle.dump({"state_dict": Trap()}, file)
    for name in ("a.ckpt", "b.ckpt"):
        with pytest.raises(ConfigurationError, match=name):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("content", [b"", b"PK", b"hello", b"\x80\x02}q\x00.", [1], {"state_dict": 3}, {"x": 1}, None])
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
    assert same(found, CHECKPOINT)  # between the records, for instance
