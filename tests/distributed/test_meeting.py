"""Processes that meet at the start: here threads, which a store cannot tell from processes."""

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dynrank.distributed.meeting import meeting
from dynrank.errors import ConfigurationError


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def meet(port, process, processes, seconds):
    with meeting("127.0.0.1", port, process, processes, seconds) as store:
        return store


def test_all_that_come_in_time_meet(port):
    with ThreadPoolExecutor(3) as threads:
        stores = list(threads.map(lambda process: meet(port, process, 3, 30), (2, 1, 0)))
    stores[0].set("greeting", "hello")
    assert stores[2].get("greeting") == b"hello"


def test_process_0_names_those_that_are_missing(port):
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(meet, port, process, 4, 1) for process in (0, 2)]
        with pytest.raises(ConfigurationError, match=r"processes \[1, 3\] of 4 .*within 1 s.*start_timeout"):
            waiting[0].result()


def test_process_0_that_never_comes_is_named(port):
    with pytest.raises(ConfigurationError, match=rf"process 0 of 2 .*at 127\.0\.0\.1:{port}"):
        meet(port, 1, 2, 0.2)


def test_a_group_that_cannot_be_made_ends_the_process(port, monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with meeting("127.0.0.1", port, 0, 1, 0.2):
        time.sleep(0.5)
    assert ended == [1]
    assert "error: all processes had come" in capsys.readouterr().err
    with meeting("127.0.0.1", port, 0, 1, 0.2):
        pass
    time.sleep(0.4)
    assert ended == [1]
