"""Processes that wait for each other at the start of a run, for a bounded time."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from dynrank.errors import ConfigurationError

_PAUSE = 0.05  # seconds between looks, so that Ctrl-C is heard


def meet(host: str, port: int, process: int, processes: int, seconds: float) -> Store:
    """Wait until all processes have called this; hold what it returns until torch's process group is made.

    torch itself waits half an hour for one that has died before it came.

    Args:
        host: where process 0 is, or the agent of torchrun.
        port: where it listens; torch's own store will share it.
        process: the number of this one.
        processes: how many there are.
        seconds: to wait.

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
    return store


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
