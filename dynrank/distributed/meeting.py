"""A bound to the time that the processes of a run wait for each other at its start."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def meeting(seconds: float) -> Iterator[None]:
    """A block in which torch makes the group of all processes; exit code 1 ends this one if that takes too long.

    torch itself waits half an hour for a process that has died, and nothing is heard meanwhile: in the block Ctrl-C and
    SIGTERM end the process as if it were no Python.
    """
    given_up = threading.Timer(seconds, _give_up, [seconds])
    given_up.daemon = True
    given_up.start()
    stops = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    handlers = {stop: signal.signal(stop, signal.SIG_DFL) for stop in stops}
    try:
        yield
    finally:
        given_up.cancel()
        for stop, handler in handlers.items():
            signal.signal(stop, handler)


def _give_up(seconds: float) -> None:
    print(
        f"error: the processes of the run did not all come within {seconds:g} s, or one has ended: see what the others "
        "printed, and end those that are left; if they only take longer to load, set start_timeout higher",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(1)
