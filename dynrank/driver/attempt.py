"""One change of ranks in a run: predicted, made, checked by validation if asked for, undone if it cost too much."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from dynrank.change.measuring import Window
from dynrank.change.predict import LayerReport, predict
from dynrank.change.replacement import Snapshot
from dynrank.change.resize import resize
from dynrank.distributed.agreement import check_processes
from dynrank.errors import ConfigurationError
from dynrank.layers.finding import lora_layers
from dynrank.schedules import How

# columns of rank_history.csv and rank_predictions.csv
FIELDS = ("step", "layer", "rank_before", "rank_after", "energy_kept", "predicted_error", "reason")


@dataclass(frozen=True)
class RankEvent:
    """One change of ranks.

    Attributes:
        step: optimizer steps made before it.
        reason: why it was made, or why it was undone.
        layers: what it did to each layer that it changed.
        undone: it cost too much and was taken back; the ranks are as before.
    """

    step: int
    reason: str
    layers: tuple[LayerReport, ...]
    undone: bool = False

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> RankEvent:
        """The event that ``state`` was made of by ``dataclasses.asdict``.

        Raises:
            ConfigurationError: if a value is of another type than an event has.
        """
        event = cls(**{**state, "layers": tuple(LayerReport(**layer) for layer in state["layers"])})
        wrong = _mistyped(event, step=int, reason=str, undone=bool)
        for layer in event.layers:
            wrong += _mistyped(layer, layer=str, rank_before=int, rank_after=int, energy_kept=float)
            wrong += _mistyped(layer, predicted_error=float, singular_values=tuple, parameters_saved=int)
            wrong += [f"{value!r} in singular_values" for value in layer.singular_values if type(value) is not float]
        if wrong:
            raise ConfigurationError(f"the history of rank changes in the checkpoint holds {wrong[0]}; set ckpt_path")
        return event


def _mistyped(record: object, **types: type) -> list[str]:
    values = {name: getattr(record, name) for name in types}
    return [f"{name}={values[name]!r:.100}" for name, wanted in types.items() if type(values[name]) is not wanted]


class Training(Protocol):
    """A run as a change of ranks sees it, whoever trains."""

    @property
    def step(self) -> int:
        """Optimizer steps made."""

    @property
    def model(self) -> nn.Module:
        """What holds the LoRA layers; their names are relative to it."""

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """All that hold the layers' parameters."""

    @property
    def averages(self) -> Sequence[nn.Module]:
        """Moving averages of the model's weights, which follow its ranks."""

    def logged(self) -> Mapping[str, float]:
        """The metrics that triggers may watch, as last logged."""

    def validate(self) -> None:
        """Validate the weights as they are; it ends in :meth:`dynrank.driver.driver.RankDriver.validated`."""

    def before_resize(self) -> None:
        """Called before factors get new shapes, also when a change is undone: let go of what knows the old ones."""

    def resized(self) -> None:
        """Called whenever factors have got new shapes, also when a change is undone."""

    def tell(self, hook: str, event: RankEvent) -> None:
        """Let those who listen know: hook is "on_rank_prediction" or "on_rank_change"."""

    def warn(self, message: str) -> None:
        """Tell the user, once for all processes."""


def change_ranks(
    training: Training,
    targets: Mapping[str, int],
    reason: str,
    how: How,
    window: Window | None,
    multiple: int,
    validated: Callable[[Training, str, bool], float],
) -> Iterator[RankEvent]:
    """Change to ``targets``, or as far as the check allows; yields each attempt, the last one may be a success.

    Args:
        training: between an optimizer step and the next forward.
        targets: {layer: new rank} of those that change.
        reason: goes into the events.
        how: see there.
        window: what was measured for this change; None where nothing had to be.
        multiple: of which ranks tried instead of refused ones are multiples.
        validated: (training, monitor, whether ranks have changed since the last validation) -> the monitor's value.
    """
    step, model, optimizers = training.step, training.model, training.optimizers
    ranks = {name: layer.rank for name, layer in lora_layers(model)}
    before, snapshot = 0.0, None
    if how.max_regression is not None and targets:
        before = validated(training, how.check_monitor, False)
        snapshot = Snapshot(model, optimizers, training.averages)
    check_processes(model, optimizers, f"before the change of rank at step {step}")
    while targets:
        predicted = predict(model, targets, how=how, measured=window)
        training.tell("on_rank_prediction", RankEvent(step, reason, tuple(predicted)))
        training.before_resize()
        reports = resize(
            model,
            targets,
            optimizers=optimizers,
            how=how,
            measured=window,
            averages=training.averages,
            generator=torch.Generator().manual_seed(step),
            collective=True,
        )
        training.resized()
        check_processes(model, optimizers, f"after the change of rank at step {step}")
        event = RankEvent(step, reason, tuple(reports))
        if snapshot is None or how.max_regression is None:
            yield event
            return
        after = validated(training, how.check_monitor, True)
        if isfinite(after) and after - before <= how.max_regression * abs(before):
            yield event
            return
        training.before_resize()
        snapshot.restore()
        training.resized()
        cost = f"undone: {how.check_monitor} {before:.4g} → {after:.4g} ({reason})"
        yield RankEvent(step, cost, event.layers, undone=True)
        targets = _gentler(ranks, targets, multiple)


def _gentler(ranks: Mapping[str, int], refused: Mapping[str, int], multiple: int) -> dict[str, int]:
    """Half as far, rounded towards the ranks now; layers that this leaves where they are drop out."""
    halves = {}
    for name, target in refused.items():
        rank = ranks[name]
        half = rank + int((target - rank) / 2)  # int() rounds towards no change
        if half < rank:
            half = min(rank, -(-half // multiple) * multiple)
        if half not in (rank, target):
            halves[name] = half
    return halves
