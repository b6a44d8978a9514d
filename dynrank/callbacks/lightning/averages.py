"""Lightning's averages of weights (WeightAveraging, EMAWeightAveraging, StochasticWeightAveraging) in a run."""

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn

from dynrank.callbacks.lightning import private


def averaging_callbacks(trainer: Trainer) -> list[Any]:
    """The trainer's callbacks that keep an average of the weights."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [c for c in callbacks if isinstance(c, StochasticWeightAveraging | WeightAveraging)]


def averages_of(trainer: Trainer) -> list[nn.Module]:
    """The present averages of these callbacks: copies of the LightningModule, or AveragedModels of it."""
    held = [private.average_model(callback) for callback in averaging_callbacks(trainer)]
    return [average for average in held if average is not None]


def act_after_averages(trainer: Trainer, scheduler: Callback) -> None:
    """Move ``scheduler`` behind the averaging callbacks, wherever the user has put it.

    When training ends, these callbacks put the average into the model. A cut after the last step must come later, so
    that it approximates the average.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    averaging = averaging_callbacks(trainer)
    if averaging and callbacks.index(scheduler) < callbacks.index(averaging[-1]):
        others = [callback for callback in callbacks if callback is not scheduler]
        others.insert(others.index(averaging[-1]) + 1, scheduler)
        # Lightning is iterating over the old list.
        trainer.callbacks = others  # type: ignore[attr-defined]
