"""What waits for a better metric, in a run whose ranks have fallen: the best so far no longer counts."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau


def wait_anew(schedulers: Iterable[Any]) -> None:
    """Let schedulers of torch that wait for a better metric wait anew, by their own ``load_state_dict``."""
    for scheduler in schedulers:
        # accelerate wraps schedulers.
        inside = getattr(scheduler, "scheduler", scheduler)
        if isinstance(inside, ReduceLROnPlateau):
            worst = inf if inside.mode == "min" else -inf
            waiting = {"best": worst, "num_bad_epochs": 0, "cooldown_counter": 0}
            inside.load_state_dict({**inside.state_dict(), **waiting})
