"""Lines that say how long a run is, how it goes and how much time is left."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

# Steps after which the time that is left is said.
_FIRST = 10
# The most seconds between two lines.
_PAUSE = 60.0


class ProgressLines(Callback):
    """Prints the length of training at its start, and after ten steps the time that is left.

    Args:
        follow: also print a line after each validation, and at least one a minute (if batches take longer, one after
            each): step, loss in training and the time left; after a validation its loss, too. Output that goes to a
            file shows no progress bar.
    """

    def __init__(self, *, follow: bool) -> None:
        self.follow = follow
        # When training began, the last line was printed and the last batch ended; the steps made before, in this run.
        self._begun = self._last = self._batch_ended = 0.0
        self._first_step = self._seen_step = 0
        # Seconds of training batches alone.
        self._trained = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun = self._last = self._batch_ended = time.monotonic()
        self._trained = 0.0
        self._first_step = self._seen_step = trainer.global_step
        steps = trainer.estimated_stepping_batches
        of_epoch = -(-trainer.num_training_batches // trainer.accumulate_grad_batches)
        epochs = f"{steps / of_epoch:.3g} epoch{'s' if steps != of_epoch else ''} of {of_epoch:,} steps"
        _say(trainer, "length", f"{steps:,} steps, {epochs} (trainer.max_epochs, trainer.max_steps)")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._trained += time.monotonic() - self._batch_ended
        step = trainer.global_step
        # With gradient accumulation several batches make one step.
        if step != self._seen_step and step - self._first_step == _FIRST:
            _say(trainer, "time left", f"{self._left(trainer)}, by the first {_FIRST} steps")
        self._seen_step = step
        self._follow_in_time(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._follow_in_time(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.follow and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._follow(trainer, "train/loss", "val/loss")

    def _follow_in_time(self, trainer: Trainer) -> None:
        """Print a line if more than a minute without one would have passed at the end of a batch like the last one."""
        now = time.monotonic()
        took = now - self._batch_ended
        self._batch_ended = now
        if self.follow and now - self._last + took > _PAUSE:
            # The last loss of a validation is one of an earlier step.
            self._follow(trainer, "train/loss")

    def _follow(self, trainer: Trainer, *metrics: str) -> None:
        """Print a line with the ``metrics`` that have been logged."""
        self._last = time.monotonic()
        values = trainer.callback_metrics
        facts = [f"{name} {float(values[name]):.4g}" for name in metrics if name in values]
        left = self._left(trainer)
        said = "; ".join(filter(None, (", ".join(facts), left and f"{left} left")))
        _say(trainer, f"step {trainer.global_step:,}", said)

    def _left(self, trainer: Trainer) -> str:
        """The time left; "" while a slow first step, or a validation soon after it, would be taken for the rule."""
        made = trainer.global_step - self._first_step
        left = trainer.estimated_stepping_batches - trainer.global_step
        if made >= _FIRST:
            return duration((time.monotonic() - self._begun) / made * left)
        if self._trained < _PAUSE / 2:
            return ""
        return duration(self._trained / made * left) if made else "all"


def duration(seconds: float) -> str:
    """Seconds in the unit that is read at a glance.

    >>> duration(42.4), duration(150), duration(5000)
    ('42 s', '3 min', '1 h 23 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = int(seconds / 60 + 0.5)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _say(trainer: Trainer, name: str, fact: str) -> None:
    if trainer.is_global_zero:
        print(f"{name:<16} {fact}", flush=True)
