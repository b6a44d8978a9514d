"""A data loader that a run can be resumed in, at any batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

CHUNK = 10  # batches that are drawn together and sorted by length


class ResumableLoader(DataLoader[Any]):
    """An endless stream of random batches of similar length; how many have been given out is its whole state.

    Examples are drawn with replacement: with epochs, the training loss falls at the start of each pass over the data
    and climbs during it, which hides what a change of rank does to it. An "epoch" is as many batches as the data set
    holds. Batch n depends on (``seed``, n) alone. Lightning saves and restores the state of any loader that has
    ``state_dict`` and ``load_state_dict``.

    Args:
        dataset: indexable.
        lengths: of each example; examples are sorted by it within ``CHUNK`` batches, which saves padding.
        batch_size: examples per batch.
        seed: of the draws.
        collate_fn: makes a batch from a list of examples.

    Raises:
        ValueError: if the data set has fewer examples than one batch.
    """

    def __init__(
        self, dataset: Dataset[Any], lengths: Sequence[int], batch_size: int, seed: int, collate_fn: Any
    ) -> None:
        self.stream = _SeededBatches(lengths, batch_size, seed)
        super().__init__(dataset, batch_sampler=self.stream, collate_fn=collate_fn)

    def state_dict(self) -> dict[str, int]:
        return {"given": self.stream.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.stream.given = state["given"]


class _SeededBatches(Sampler[list[int]]):
    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        if len(lengths) < batch_size:
            raise ValueError(f"batch_size must be at most the number of examples, {len(lengths)}, got {batch_size}")
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.given = 0

    def __len__(self) -> int:
        return len(self.lengths) // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        end = (self.given // len(self) + 1) * len(self)
        chunk, batches = -1, [[0]]
        while self.given < end:
            if self.given // CHUNK != chunk:
                chunk = self.given // CHUNK
                batches = self._draw(chunk)
            self.given += 1
            yield batches[(self.given - 1) % CHUNK]

    def _draw(self, chunk: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(hash((self.seed, chunk)) % 2**63)
        picks = torch.randint(len(self.lengths), (CHUNK * self.batch_size,), generator=generator).tolist()
        picks.sort(key=lambda i: self.lengths[i])
        batches = [picks[i : i + self.batch_size] for i in range(0, len(picks), self.batch_size)]
        return [batches[i] for i in torch.randperm(CHUNK, generator=generator).tolist()]
