"""Lightning's rich progress bar with the ranks in it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from dynrank.layers.finding import lora_layers
from dynrank.output.console import span


class RankProgressBar(RichProgressBar):
    """Shows ``rank: 16``, or ``rank: 4-32`` where layers differ; without max_epochs it counts epochs with no total."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        ranks = {layer.rank for _, layer in lora_layers(pl_module)}
        return {"rank": span(ranks), **metrics} if ranks else metrics

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        if trainer.max_epochs == -1 and self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, description=f"Epoch {trainer.current_epoch}")
