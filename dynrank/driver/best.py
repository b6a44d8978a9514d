"""What waits for a better metric, in a run whose ranks have fallen: the best so far no longer counts."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from dynrank.driver.event import RankEvent
from dynrank.output.ranks import ranks_in_words


def words(best: str, event: RankEvent) -> str:
    """What is said of the ``best`` so far when ``event`` has lowered ranks."""
    before = ranks_in_words(event.ranks_before)
    after = ranks_in_words(layer.rank_after for layer in event.layers)
    return f"best so far, at {before}: {best}; from here on the best of {after} counts (keep_best_before)"


def wait_anew(schedulers: Iterable[Any]) -> None:
    """Let schedulers of torch that wait for a better metric wait anew, by their own ``load_state_dict``."""
    for scheduler in schedulers:
        # accelerate wraps schedulers.
        inside = getattr(scheduler, "scheduler", scheduler)
        if isinstance(inside, ReduceLROnPlateau):
            worst = inf if inside.mode == "min" else -inf
            waiting = {"best": worst, "num_bad_epochs": 0, "cooldown_counter": 0}
            inside.load_state_dict({**inside.state_dict(), **waiting})
