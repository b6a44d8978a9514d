"""What Lightning's callbacks call the best so far, in a run whose ranks fall: only what comes after the last cut."""

from __future__ import annotations

from copy import deepcopy

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from dynrank.driver.best import wait_anew, words
from dynrank.driver.event import RankEvent


class BestSoFar:
    """The states of a trainer's ModelCheckpoints and EarlyStoppings before the run; make it in ``setup``."""

    def __init__(self, trainer: Trainer) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        judges = [each for each in callbacks if isinstance(each, ModelCheckpoint | EarlyStopping)]
        self._states = [(judge, deepcopy(judge.state_dict())) for judge in judges]

    def forget(self, trainer: Trainer, event: RankEvent) -> None:
        """Let only what comes after ``event``, which has lowered ranks, count; files of before stay on disk."""
        paths = [callback.best_model_path for callback, _ in self._states if isinstance(callback, ModelCheckpoint)]
        self.load(trainer)
        if lost := [path for path in dict.fromkeys(paths) if path]:
            rank_zero_info(words(", ".join(lost), event))

    def load(self, trainer: Trainer) -> None:
        """Let all wait anew, callbacks by their own states of before the run; not in ``validate`` after it."""
        if trainer.state.fn == "fit":
            wait_anew(config.scheduler for config in trainer.lr_scheduler_configs)
        for callback, state in self._states if trainer.state.fn == "fit" else ():
            kept = {}
            if isinstance(callback, ModelCheckpoint):
                # The folder is known only after the setup, and the last file is still the last.
                kept = {"dirpath": callback.dirpath, "last_model_path": callback.last_model_path}
            callback.load_state_dict({**deepcopy(state), **kept})
