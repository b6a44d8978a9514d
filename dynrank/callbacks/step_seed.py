"""Randomness that a resumed run repeats: a seed for every batch, not a stream that has to be saved."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class StepSeed(Callback):
    """Seeds torch before each training batch from (``seed``, epoch, batch), so dropout is the same after any resume.

    Nothing that happens between batches (a validation, a re-made loader, a restart) changes the masks of the next one.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(hash((self.seed, trainer.current_epoch, batch_idx, trainer.global_rank)) % 2**63)
