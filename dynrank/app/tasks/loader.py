"""A data loader of epochs that can be resumed at any batch, and the division of examples among processes."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dynrank.errors import ConfigurationError

# How many batches are sorted by length together.
CHUNK = 10


class ResumableLoader(DataLoader[Any]):
    """Epochs of batches of similar length, each a permutation; the number of batches so far is its whole state.

    An epoch has each example once, in an order that depends only on (``seed``, epoch). Its last batch may be smaller.
    N processes draw one batch of N times the size, and each takes its share, so together they train on the same batch
    as one process would; only where N does not divide the examples, an epoch repeats fewer than N of them. The state
    does not depend on the number of processes. Lightning saves and restores it. Where Lightning leaves an epoch early
    (``limit_train_batches``), the next one begins with the rest of the permutation.

    Examples are sorted by their ``lengths`` within ``CHUNK`` batches, which saves padding. ``batch_size`` counts the
    examples of one process, and ``share`` is (number of this process, number of processes).
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        collate_fn: Any,
        *,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.stream = _SeededBatches(lengths, batch_size * share[1], seed, share)
        super().__init__(dataset, batch_sampler=self.stream, collate_fn=collate_fn)

    def state_dict(self) -> dict[str, int]:
        return {"given": self.stream.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.stream.given = state["given"]


class _SeededBatches(Sampler[list[int]]):
    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, share: tuple[int, int]) -> None:
        # batch_size is that of all processes together; one process takes every share[1]th example of a batch.
        self.lengths = torch.as_tensor(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.share = share
        self.given = 0

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        process, processes = self.share
        end = self.given + len(self)
        epoch = -1
        batches = list[list[int]]()
        while self.given < end:
            if self.given // len(self) != epoch:
                epoch = self.given // len(self)
                batches = self._permuted(epoch)
            batch = batches[self.given % len(self)]
            self.given += 1
            yield batch[process::processes]

    def _permuted(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch, for all processes together."""
        # The same number with every interpreter, which hash() is not.
        (seed,) = np.random.SeedSequence((self.seed % 2**64, epoch)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(seed))
        picks = torch.randperm(len(self.lengths), generator=generator)
        # All processes get as many examples of the last batch.
        picks = torch.cat([picks, picks[: -len(picks) % self.share[1]]])
        batches = list[list[int]]()
        for chunk in torch.split(picks, CHUNK * self.batch_size):
            by_length = chunk[self.lengths[chunk].argsort(stable=True)]
            parts = torch.split(by_length, self.batch_size)
            batches += [parts[i].tolist() for i in torch.randperm(len(parts), generator=generator)]
        return batches


def evaluation_batches(count: int, batch_size: int, share: tuple[int, int]) -> list[list[int]]:
    """Indices of the batches in which one process evaluates its share of ``count`` examples.

    Each example is used once, by one process. All processes get the same number of batches, because a batch may need
    communication between them. The sizes of batches differ by at most one, and are at most ``batch_size``, or 2 where
    it is 1 and some processes have one example more. ``share`` is (number of this process, number of processes).
    """
    process, processes = share
    if count < processes:
        raise ConfigurationError(f"{count} examples cannot be divided among {processes} processes; set data")
    # The process with the fewest examples has no empty batch.
    batches = min(-(-count // (batch_size * processes)), count // processes)
    mine = range(process, count, processes)
    cuts = [len(mine) * i // batches for i in range(batches + 1)]
    return [list(mine[start:end]) for start, end in pairwise(cuts)]


def spread(examples: datasets.Dataset, count: int | None) -> datasets.Dataset:
    """``count`` examples at equal distances in the data set, or all."""
    if count is None or count >= len(examples):
        return examples
    return examples.select([i * len(examples) // count for i in range(count)])
