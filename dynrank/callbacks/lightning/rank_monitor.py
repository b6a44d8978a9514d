"""Changes of rank: a table, rank_history.csv, numbers for the loggers and the progress bar."""

import csv
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from dynrank.callbacks.lightning.rank_scheduler import RankScheduler
from dynrank.distributed.wrappers import unwrapped_optimizer
from dynrank.driver.event import FIELDS, RankEvent
from dynrank.driver.notices import start_notices
from dynrank.layers.finding import lora_layers
from dynrank.output.console import print_table
from dynrank.output.ranks import rank_totals
from dynrank.output.whole_file import whole_file


class RankMonitor(Callback):
    """Shows and records the changes by a :class:`RankScheduler` of the same trainer; it changes nothing.

    Each change is printed as a table; before training a line says what a server will reserve.
    Every logger gets ``rank/mean``, ``rank/max`` and ``rank/parameters`` at the start and after each change; all of
    them except the CSVLogger, where each name would be a column, also get ``rank/layer/NAME``. Each step logs
    ``rank/mean``, which a progress bar shows, and its learning rates as ``lr/NAME``; NAME is a param group's ``name``,
    or its number. (RankScheduler logs ``lr/adapter`` where it differs.)

    Args:
        history_file: CSV file of all changes of the run, also those before a resume, with the importance of each layer
            before (the loss's decrease by its updates, and its standard error). If a change was undone, its reason
            begins with "undone". None: no file.
        model_name: attribute of the LightningModule whose value is the model; left out of the layers' names.

    Example::

        Trainer(callbacks=[RankScheduler(8), RankMonitor("rank_history.csv", model_name="model")]).fit(module)
    """

    def __init__(self, history_file: str | Path | None = None, model_name: str = "") -> None:
        self.history_file = Path(history_file) if history_file is not None else None
        self.prefix = f"{model_name}." if model_name else ""
        # What is logged of the present ranks; empty if there are no layers.
        self._ranks: dict[str, float] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Written here so that a run without steps gets the file, too.
        self._write_history(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # FSDP2 loads the history of a resumed run later than on_fit_start.
        self._write_history(trainer)
        self._log_ranks(trainer, pl_module)
        if trainer.is_global_zero:
            self._print_notices(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        groups = [group for optimizer in trainer.optimizers for group in unwrapped_optimizer(optimizer).param_groups]
        # An optimizer that computes its own rate may have None.
        rates = {f"lr/{group.get('name', number)}": group["lr"] for number, group in enumerate(groups)}
        values = {name: float(rate) for name, rate in rates.items() if rate is not None}
        pl_module.log_dict(values)
        if self._ranks:
            pl_module.log("rank/mean", self._ranks["rank/mean"], prog_bar=True)

    def on_rank_change(self, trainer: Trainer, pl_module: LightningModule, event: RankEvent) -> None:
        event = self._shortened(event)
        self._write_history(trainer)
        self._log_ranks(trainer, pl_module)
        if trainer.is_global_zero:
            print_table(event.table(self._by_layer(pl_module)))

    def _log_ranks(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ranks = rank_totals(pl_module)
        by_layer = {f"rank/layer/{name}": float(rank) for name, rank in self._by_layer(pl_module).items()}
        for logger in trainer.loggers if by_layer else ():
            shown = self._ranks if isinstance(logger, CSVLogger) else self._ranks | by_layer
            logger.log_metrics(shown, step=trainer.global_step)

    def _print_notices(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for driver in (c.driver for c in trainer.callbacks if isinstance(c, RankScheduler)):  # type: ignore[attr-defined]
            for notice in start_notices(pl_module, driver.stages[driver.progress.stage :], driver.rules):
                print(notice, flush=True)

    def _by_layer(self, pl_module: LightningModule) -> dict[str, int]:
        return {name.removeprefix(self.prefix): layer.rank for name, layer in lora_layers(pl_module)}

    def _write_history(self, trainer: Trainer) -> None:
        if self.history_file is None or not trainer.is_global_zero:
            return
        events = [e for c in trainer.callbacks if isinstance(c, RankScheduler) for e in c.history]  # type: ignore[attr-defined]
        with whole_file(self.history_file) as part, part.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([FIELDS, *(row for event in events for row in _rows(self._shortened(event)))])

    def _shortened(self, event: RankEvent) -> RankEvent:
        """The event with the layers' names relative to the model."""
        layers = tuple(replace(layer, layer=layer.layer.removeprefix(self.prefix)) for layer in event.layers)
        return replace(event, layers=layers)


def _rows(event: RankEvent) -> Iterable[tuple[object, ...]]:
    for la in event.layers:
        kept = f"{la.energy_kept:.6g}", f"{la.predicted_error:.6g}"
        importance = ["" if value is None else f"{value:.6g}" for value in (la.importance, la.importance_error)]
        yield event.step, la.layer, la.rank_before, la.rank_after, *importance, *kept, event.reason_and_cost
