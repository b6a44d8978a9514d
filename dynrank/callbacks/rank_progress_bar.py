"""Lightning's rich progress bar, which also shows the ranks."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from dynrank.driver.event import RankEvent
from dynrank.layers.finding import lora_layers
from dynrank.output.console import span


class RankProgressBar(RichProgressBar):
    """Shows ``rank: 16``, or ``rank: 4-32`` if layers differ; without max_epochs it shows no total of epochs."""

    _ranks: str | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._find_ranks(pl_module)
        super().on_train_start(trainer, pl_module)

    def on_rank_change(self, trainer: Trainer, pl_module: LightningModule, event: RankEvent) -> None:
        self._find_ranks(pl_module)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        return {"rank": self._ranks, **metrics} if self._ranks is not None else metrics

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        if trainer.max_epochs == -1 and self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, description=f"Epoch {trainer.current_epoch}")

    def _find_ranks(self, pl_module: LightningModule) -> None:
        ranks = {layer.rank for _, layer in lora_layers(pl_module)}
        self._ranks = span(ranks) if ranks else None
