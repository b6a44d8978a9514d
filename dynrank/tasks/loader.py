"""A data loader that a run can be resumed in, at any batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler


class ResumableLoader(DataLoader[Any]):
    """Shuffled batches whose order depends on (``seed``, epoch) alone, with the place in it as state.

    Iterating goes on where the state says and then starts the next epoch. Lightning saves and restores the state of any
    loader that has ``state_dict`` and ``load_state_dict``. The last, incomplete batch of an epoch is dropped.

    Args:
        dataset: indexable.
        batch_size: examples per batch.
        seed: of the order.
        collate_fn: makes a batch from a list of examples.

    Raises:
        ValueError: if the data set has fewer examples than one batch.
    """

    def __init__(self, dataset: Dataset[Any], batch_size: int, seed: int, collate_fn: Any) -> None:
        self.order = _SeededBatches(len(dataset), batch_size, seed)  # type: ignore[arg-type]
        super().__init__(dataset, batch_sampler=self.order, collate_fn=collate_fn)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.order.epoch, "batch": self.order.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.order.epoch, self.order.batch = state["epoch"], state["batch"]


class _SeededBatches(Sampler[list[int]]):
    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        if size < batch_size:
            raise ValueError(f"batch_size must be at most the number of examples, {size}, got {batch_size}")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.epoch, self.batch = 0, 0  # batches of this epoch already given out

    def __len__(self) -> int:
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        if self.batch >= len(self):
            self.epoch, self.batch = self.epoch + 1, 0
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)) % 2**63)
        order = torch.randperm(self.size, generator=generator).tolist()
        while self.batch < len(self):
            start = self.batch * self.batch_size
            self.batch += 1
            yield order[start : start + self.batch_size]
