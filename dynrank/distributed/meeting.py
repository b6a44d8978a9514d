"""Processes that wait for each other at the start of a run, for a bounded time."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Timer

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from dynrank.errors import ConfigurationError

_PAUSE = 0.05  # seconds between looks, so that Ctrl-C is heard


@contextmanager
def meeting(host: str, port: int, process: int, processes: int, seconds: float) -> Iterator[Store]:
    """Wait until all processes have come, then make torch's process group in the block; the store that they share.

    torch itself waits half an hour for one that has died. One that dies within the block, where torch waits and hears
    nothing, ends this process with exit code 1 after ``seconds``.

    Args:
        host: where process 0 is, or the agent of torchrun.
        port: where it listens; torch's own store will share it.
        process: the number of this one.
        processes: how many there are.
        seconds: to wait, for all to come and then for the group.

    Raises:
        ConfigurationError: naming the processes that have not come in time.
    """
    deadline, shared = time.monotonic() + seconds, os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = process == 0 and not shared
    if not serves and not _in_time(deadline, lambda: _listens(host, port)):
        raise _late("the agent of torchrun" if shared else "process 0", f" at {host}:{port}", processes, seconds)
    patience = timedelta(seconds=max(1.0, deadline - time.monotonic()))
    server = TCPStore(host, port, processes, serves, patience, wait_for_workers=False, multi_tenant=True)
    store = PrefixStore("dynrank", server)
    store.set(str(process), "")
    if not _in_time(deadline, lambda: store.check([str(other) for other in range(processes)])):
        missing = [other for other in range(processes) if not store.check([str(other)])]
        raise _late(f"processes {missing}", "", processes, seconds)
    given_up = Timer(seconds, _give_up, [seconds])
    given_up.daemon = True
    given_up.start()
    try:
        yield store
    finally:
        given_up.cancel()


def _give_up(seconds: float) -> None:
    print(
        f"error: all processes had come, but could not make their group within {seconds:g} s: one has ended meanwhile, "
        "see what it printed; if it only takes longer, set start_timeout higher",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(1)


def _in_time(deadline: float, done: Callable[[], bool]) -> bool:
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE)
    return True


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:  # not yet
        return False
    return True


def _late(who: str, where: str, processes: int, seconds: float) -> ConfigurationError:
    return ConfigurationError(
        f"{who} of {processes} processes did not come within {seconds:g} s{where}: see what it printed, and end those "
        "that are left; if it only takes longer to load, set start_timeout higher"
    )
