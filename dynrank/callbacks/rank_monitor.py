"""Telling of a change of rank: a printed table, a CSV file, and numbers for the loggers."""

from __future__ import annotations

import csv
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from dynrank.callbacks.rank_logging import log_prediction, log_ranks
from dynrank.callbacks.rank_progress_bar import RankProgressBar
from dynrank.callbacks.rank_scheduler import RankScheduler
from dynrank.driver.attempt import FIELDS, RankEvent
from dynrank.layers.finding import lora_layers
from dynrank.output.change_table import change_table


class RankMonitor(Callback):
    """Shows and records what a :class:`RankScheduler` in the same trainer does; it changes nothing.

    Every logger gets the ranks at the start and after each change, and before a change what it is expected to cost, see
    :mod:`dynrank.callbacks.rank_logging`. A progress bar shows the mean rank, and a ModelSummary that the trainer has
    is printed again after each change.

    Args:
        history_file: CSV file of all changes of the run, also those before a resume (the reason of a change that was
            taken back begins with "undone"); None: no file.
        prediction_file: CSV file of the same form, written before each change: what it is expected to cost; None: no
            file.
        model_name: attribute of the LightningModule that holds the model; left out of the layers' names.
    """

    def __init__(
        self,
        history_file: str | Path | None = None,
        model_name: str = "",
        *,
        prediction_file: str | Path | None = None,
    ) -> None:
        self.history_file = Path(history_file) if history_file is not None else None
        self.prediction_file = Path(prediction_file) if prediction_file is not None else None
        self.prefix = f"{model_name}." if model_name else ""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write_history(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_ranks(trainer, pl_module)

    def on_rank_prediction(self, trainer: Trainer, pl_module: LightningModule, event: RankEvent) -> None:
        log_prediction(trainer.loggers, self._named(event))
        if self.prediction_file is not None and trainer.is_global_zero:
            new = not self.prediction_file.exists()
            with self.prediction_file.open("a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerows([FIELDS] if new else [])
                writer.writerows(self._rows(event))

    def on_rank_change(self, trainer: Trainer, pl_module: LightningModule, event: RankEvent) -> None:
        self._write_history(trainer)
        self._log_ranks(trainer, pl_module)
        self._print(event)
        for callback in trainer.callbacks if not event.undone else ():  # type: ignore[attr-defined]
            if isinstance(callback, ModelSummary):  # RichModelSummary, too
                callback.on_fit_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        bar = trainer.progress_bar_callback
        if bar is not None and not isinstance(bar, RankProgressBar):  # which shows it by itself
            ranks = [float(layer.rank) for _, layer in lora_layers(pl_module)]
            pl_module.log("rank", sum(ranks) / max(1, len(ranks)), prog_bar=True, logger=False)

    @rank_zero_only
    def _write_history(self, trainer: Trainer) -> None:
        if self.history_file is None:
            return
        events = [e for c in trainer.callbacks if isinstance(c, RankScheduler) for e in c.history]  # type: ignore[attr-defined]
        part = self.history_file.with_suffix(".part")
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(FIELDS)
            for event in events:
                writer.writerows(self._rows(event))
        os.replace(part, self.history_file)

    def _rows(self, event: RankEvent) -> list[list[object]]:
        return [
            [
                event.step,
                layer.layer,
                layer.rank_before,
                layer.rank_after,
                f"{layer.energy_kept:.6g}",
                f"{layer.predicted_error:.6g}",
                event.reason,
            ]
            for layer in self._named(event).layers
        ]

    def _log_ranks(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layers = {name.removeprefix(self.prefix): layer for name, layer in lora_layers(pl_module)}
        log_ranks(trainer.loggers, layers, trainer.global_step)

    def _named(self, event: RankEvent) -> RankEvent:
        layers = tuple(replace(layer, layer=layer.layer.removeprefix(self.prefix)) for layer in event.layers)
        return replace(event, layers=layers)

    @rank_zero_only
    def _print(self, event: RankEvent) -> None:
        verb = "taken back" if event.undone else "change"
        Console().print(change_table(f"rank {verb} at step {event.step}: {event.reason}", self._named(event).layers))
