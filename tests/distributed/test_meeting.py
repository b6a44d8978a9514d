"""Processes that meet at the start: here threads, which a store cannot tell from processes."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from dynrank.distributed.meeting import meet
from dynrank.errors import ConfigurationError


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_all_that_come_in_time_meet(port):
    with ThreadPoolExecutor(3) as threads:
        stores = list(threads.map(lambda process: meet("127.0.0.1", port, process, 3, 30), (2, 1, 0)))
    stores[0].set("greeting", "hello")
    assert stores[2].get("greeting") == b"hello"


def test_process_0_names_those_that_are_missing(port):
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(meet, "127.0.0.1", port, process, 4, 1) for process in (0, 2)]
        with pytest.raises(ConfigurationError, match=r"processes \[1, 3\] of 4 .*within 1 s.*start_timeout"):
            waiting[0].result()


def test_process_0_that_never_comes_is_named(port):
    with pytest.raises(ConfigurationError, match=rf"process 0 of 2 .*at 127\.0\.0\.1:{port}"):
        meet("127.0.0.1", port, 1, 2, 0.2)
