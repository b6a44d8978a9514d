"""The small runs that ``crash_matrix.py`` stops: schedules, optimizers, checkpoint callbacks, one process or two."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes
import lightning
import schedulefree
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

import dynrank
from dynrank.callbacks import AdapterCheckpoint, RankScheduler, ScheduleFreeMode, StepSeed
from dynrank.commands.cli import usage_errors
from dynrank.run.stopping import CtrlC, stoppable
from dynrank.schedules import How, Stage, anneal, auto, early_budget
from dynrank.targets import GrowTo, Rank
from dynrank.tasks.loader import ResumableLoader, evaluation_batches
from dynrank.triggers import At, Plateau

# An epoch has 10 batches, and a validation comes every 4 steps.
STEPS = 30
# Validated before and after.
CHECKED = How(metric="gates", window=3, rate_after=2.0, max_regression=10.0)
WATCHED = How(metric="gates", window=4, rate_after="sqrt")
# Decided at step 8.
LEVEL = Plateau(patience=1, min_delta=0.9)
SCHEDULES: dict[str, list[Stage]] = {
    "plateau and cut, checked": [Stage(LEVEL, Rank(4), how=CHECKED), Stage(At(step=19), Rank(2), how=CHECKED)],
    "undone twice": [
        Stage(At(step=step), Rank(rank), how=How(max_regression=0.01)) for step, rank in ((9, 2), (20, 1))
    ],
    "grown at random, then cut": [
        Stage(At(step=6), GrowTo(9), how=How(rate_after=2.0)),
        Stage(At(step=17), Rank(2), how=How(rate_after=2.0)),
    ],
    "early budget": early_budget(3, how=WATCHED),
    "anneal": anneal(2, shared=False, how=How(rate_after=2.0)),
    "auto": auto(0.5, share=0.5, at=0.4, how=WATCHED),
    "cut at the end, checked": [Stage(At(fraction=1.0), Rank(2), how=How(max_regression=10.0))],
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": partial(torch.optim.AdamW, lr=1e-2),
    "SGD": partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
    "Adafactor": partial(torch.optim.Adafactor, lr=0.1),
    "schedule-free AdamW": partial(schedulefree.AdamWScheduleFree, lr=1e-2),
    "8-bit AdamW": partial(bitsandbytes.optim.AdamW8bit, lr=1e-2, min_8bit_size=1),
}
CALLBACKS: dict[str, Any] = {"AdapterCheckpoint": AdapterCheckpoint, "ModelCheckpoint": ModelCheckpoint}


@dataclass(frozen=True)
class Case:
    """A run: names of the tables above, and optimizer steps between checkpoints; no callback saves nothing."""

    schedule: str
    optimizer: str
    processes: int
    callback: str | None = None
    every: int = 1


class Regression(lightning.LightningModule):
    """Learns a linear map; two layers with LoRA, dropout in between, a norm whose statistics move (in one process)."""

    def __init__(self, case: Case, process: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.case, self.share = case, (process, case.processes)
        x = torch.randn(80, 12)
        self.pairs = TensorDataset(x, x @ torch.randn(12, 12))
        norm = nn.BatchNorm1d(24) if case.processes == 1 else nn.Identity()
        net = nn.Sequential(nn.Linear(12, 24), norm, nn.Dropout(0.2), nn.Linear(24, 12))
        self.net = dynrank.add_lora(net, rank=6, alpha=12)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.case.optimizer]([p for p in self.parameters() if p.requires_grad])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * STEPS)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def train_dataloader(self) -> ResumableLoader:
        return ResumableLoader(self.pairs, [1] * 80, 8 // self.share[1], 3, default_collate, share=self.share)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.pairs, batch_sampler=evaluation_batches(80, 40 // self.share[1], self.share))


def train(case: Case, folder: Path, process: int, watches: list[lightning.Callback]) -> dict[str, Any]:
    """Make the run whose checkpoints are in ``folder``, or go on with it; what it comes to in this ``process``."""
    # Lightning writes there and then moves the file, which is one step only within one disk.
    tempfile.tempdir = str(folder)
    scheduler = RankScheduler(deepcopy(SCHEDULES[case.schedule]))
    callbacks = [ScheduleFreeMode(), scheduler, StepSeed(0), *watches]
    if case.callback is not None:
        options = {"every_n_train_steps": case.every, "save_top_k": 1, "enable_version_counter": False}
        callbacks.append(CALLBACKS[case.callback](folder, filename="last", **options))
    if case.callback == "AdapterCheckpoint":
        callbacks.append(CtrlC())
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=STEPS, callbacks=callbacks, logger=False, val_check_interval=4,
        check_val_every_n_epoch=None, num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False,
        devices=case.processes, use_distributed_sampler=False, enable_checkpointing=case.callback is not None,
        strategy="auto" if case.processes == 1 else DDPStrategy(timeout=timedelta(seconds=60)),
    )  # fmt: skip
    checkpoint = folder / "last.ckpt" if (folder / "last.ckpt").exists() else None
    module = Regression(case, process)
    with usage_errors(), stoppable(trainer, checkpoint):
        trainer.fit(module, ckpt_path=checkpoint)
    history = [(event.step, event.reason, repr(event.layers)) for event in scheduler.history]
    return {"weights": module.state_dict(), "optimizer": trainer.optimizers[0].state_dict(), "history": history}
