"""Processes that meet at the start, or do not."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dynrank.distributed.meeting import meeting


@pytest.fixture
def ended(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    return ended


def test_a_group_that_cannot_be_made_ends_the_process(ended, capsys):
    with meeting(0.2):
        time.sleep(0.5)
    assert ended == [1]
    assert "did not all come within 0.2 s" in capsys.readouterr().err


def test_a_group_that_is_made_in_time_changes_nothing(ended):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with meeting(0.2):
        pass
    time.sleep(0.4)
    assert not ended
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


ALONE = """
import sys
from torch import distributed
from dynrank.distributed.meeting import meeting
with meeting(float(sys.argv[1])):
    print("waits", flush=True)
    distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=2)
"""


@pytest.mark.parametrize(("seconds", "stop", "code"), [("1", None, 1), ("300", signal.SIGINT, -signal.SIGINT)])
def test_process_that_waits_for_one_that_never_comes_ends(seconds, stop, code):
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    alone = subprocess.Popen([sys.executable, "-c", ALONE, seconds], env=environment, stdout=subprocess.PIPE)
    with alone:
        assert alone.stdout.readline() == b"waits\n"
        if stop is not None:
            time.sleep(1)
            alone.send_signal(stop)
        assert alone.wait(100) == code
