"""What the Trainer calls the best so far, in a run whose ranks fall: only what comes after the last cut."""

from __future__ import annotations

from transformers import Trainer

from dynrank.driver.best import wait_anew, words
from dynrank.driver.event import RankEvent


def forget_best(trainer: Trainer, event: RankEvent) -> None:
    """Let everything after ``event``, which has lowered ranks, count as better than everything before it.

    EarlyStoppingCallback counts anew where there is no best metric, and ``reduce_lr_on_plateau`` waits anew.
    """
    wait_anew([trainer.lr_scheduler])
    state = trainer.state
    if state.best_metric is None:
        return
    if state.is_world_process_zero:
        print(words(f"{state.best_metric:.4g}", event))
    state.best_metric = None
    state.best_global_step = None
    state.best_model_checkpoint = None
