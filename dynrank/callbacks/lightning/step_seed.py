"""Randomness that a resumed run repeats: each batch has its own seed, so no generator state has to be saved."""

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class StepSeed(Callback):
    """Seeds torch before each training batch from (``seed``, epoch, batch), so dropout is the same after any resume.

    Nothing between two batches (a validation, a new loader, a restart) changes the dropout masks of the next batch.

    Example::

        trainer = Trainer(callbacks=[RankScheduler(8), AdapterCheckpoint("checkpoints"), StepSeed(0)])
        trainer.fit(module, ckpt_path="last")
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # The same number with every interpreter, which hash() is not.
        place = (self.seed % 2**64, trainer.current_epoch, batch_idx, trainer.global_rank)
        (seed,) = np.random.SeedSequence(place).generate_state(1, np.uint64)
        torch.manual_seed(int(seed))
