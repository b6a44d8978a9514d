"""Runs of Lightning's and transformers' Trainer that make one optimizer step at a call, to be measured in turns."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

import lightning
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

# Batches in a step, rows in a batch and tokens in a row.
BATCHES = 2
ROWS = 2
TOKENS = 16
# More steps than anybody takes.
MANY = 10**6


class _Ended(Exception):
    """Nobody wants a further step."""


class Stepping(IterableDataset[dict[str, Tensor]]):
    """A run in a thread of its own, which waits for the next call of :meth:`step` where it asks for data.

    ``train`` gets this data set and trains with it.
    """

    def __init__(self, train: Callable[[Stepping], object]) -> None:
        super().__init__()
        self._wanted = threading.Semaphore(0)
        self._made = threading.Semaphore(0)
        self._train = train
        self._error: Exception | None = None
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._wait()

    def _run(self) -> None:
        try:
            self._train(self)
        except _Ended:
            pass
        except Exception as error:
            self._error = error
        self._made.release()

    def _wait(self) -> None:
        self._made.acquire()
        if self._error is not None:
            raise self._error

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        while True:
            self._made.release()
            self._wanted.acquire()
            if self._has_ended:
                raise _Ended
            for _ in range(BATCHES * ROWS):
                row = torch.randint(100, (TOKENS,), generator=generator)
                yield {"input_ids": row, "labels": row}

    def step(self) -> None:
        """Make the next step."""
        self._wanted.release()
        self._wait()

    def end(self) -> None:
        """End the run and its thread."""
        self._has_ended = True
        self._wanted.release()
        self._thread.join()


class _Module(lightning.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.train()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)


def by_lightning(model: nn.Module, *callbacks: Any) -> Stepping:
    """A run of Lightning's Trainer that logs nothing."""
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = lightning.Trainer(
        max_steps=MANY,
        devices=1,
        accumulate_grad_batches=BATCHES,
        callbacks=[*callbacks],
        **dict.fromkeys(quiet, False),
    )
    return Stepping(lambda rows: trainer.fit(_Module(model), DataLoader(rows, batch_size=ROWS)))


def by_transformers(model: nn.Module, *callbacks: Any) -> Stepping:
    """A run of transformers' Trainer that logs nothing."""
    never = {"save_strategy": "no", "logging_strategy": "no", "report_to": [], "disable_tqdm": True}
    size = {"per_device_train_batch_size": ROWS, "gradient_accumulation_steps": BATCHES}
    arguments = transformers.TrainingArguments(tempfile.mkdtemp(), max_steps=MANY, **never, **size)
    return Stepping(
        lambda rows: transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[*callbacks]).train()
    )
