"""A data loader that a run can be resumed in, at any batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

CHUNK = 20  # batches that are sorted by length together


class ResumableLoader(DataLoader[Any]):
    """Shuffled batches of similar length, in an order of (``seed``, epoch) alone; the place in it is state.

    Iterating goes on where the state says and then starts the next epoch. Lightning saves and restores the state of any
    loader that has ``state_dict`` and ``load_state_dict``. The last, incomplete batch of an epoch is dropped.

    Args:
        dataset: indexable.
        lengths: of each example; examples are sorted by it within chunks of shuffled batches, which saves padding.
        batch_size: examples per batch.
        seed: of the order.
        collate_fn: makes a batch from a list of examples.

    Raises:
        ValueError: if the data set has fewer examples than one batch.
    """

    def __init__(
        self, dataset: Dataset[Any], lengths: Sequence[int], batch_size: int, seed: int, collate_fn: Any
    ) -> None:
        self.order = _SeededBatches(lengths, batch_size, seed)
        super().__init__(dataset, batch_sampler=self.order, collate_fn=collate_fn)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.order.epoch, "batch": self.order.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.order.epoch, self.order.batch = state["epoch"], state["batch"]


class _SeededBatches(Sampler[list[int]]):
    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        if len(lengths) < batch_size:
            raise ValueError(f"batch_size must be at most the number of examples, {len(lengths)}, got {batch_size}")
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.epoch, self.batch = 0, 0  # batches of this epoch already given out

    def __len__(self) -> int:
        return len(self.lengths) // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        if self.batch >= len(self):
            self.epoch, self.batch = self.epoch + 1, 0
        batches = self._batches()
        while self.batch < len(self):
            self.batch += 1
            yield batches[self.batch - 1]

    def _batches(self) -> list[list[int]]:
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)) % 2**63)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()[: len(self) * self.batch_size]
        chunk, batches = CHUNK * self.batch_size, []
        for start in range(0, len(order), chunk):
            similar = sorted(order[start : start + chunk], key=lambda i: self.lengths[i])
            batches += [similar[i : i + self.batch_size] for i in range(0, len(similar), self.batch_size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
