from itertools import chain, repeat

import pytest
import torch
from datasets import Dataset
from torch.utils.data import TensorDataset, default_collate

from dynrank.app.tasks.loader import ResumableLoader, evaluation_batches, spread
from dynrank.errors import ConfigurationError

LENGTHS = [1 + i % 7 for i in range(50)]


def loader(seed=0, batch_size=8, share=(0, 1)):
    data = TensorDataset(torch.arange(50), torch.tensor(LENGTHS))
    return ResumableLoader(data, LENGTHS, batch_size, seed, default_collate, share=share)


def stream(source, count):
    batches = []
    while len(batches) < count:
        batches += [tuple(batch[0].tolist()) for batch in source]
    return batches[:count]


@pytest.mark.parametrize("given", range(0, 30, 7))
def test_processes_share_the_batches_of_one_also_after_a_resume_at_any_batch(given):
    first = loader()
    epochs = chain.from_iterable(repeat(first))
    for _ in range(given):
        next(epochs)
    sources = [loader(), *(loader(batch_size=4, share=(process, 2)) for process in (0, 1))]
    for source in sources:
        # The state is the same for either number of processes.
        source.load_state_dict(first.state_dict())
    whole, *shares = (stream(source, 10) for source in sources)
    assert whole == stream(loader(), given + 10)[given:] != stream(loader(1), given + 10)[given:]
    assert [(batch[::2], batch[1::2]) for batch in whole] == list(zip(*shares, strict=True))


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_an_epoch_has_each_example_once(processes):
    """In another order than the one before; only examples that do not divide among processes come again."""
    sources = [loader(batch_size=12 // processes, share=(process, processes)) for process in range(processes)]
    orders = []
    for _ in range(3):
        epochs = [[batch[0].tolist() for batch in source] for source in sources]
        # All processes have as many in each batch, and all batches but one are full.
        sizes = [[len(batch) for batch in epoch] for epoch in epochs]
        assert sizes == [sizes[0]] * processes
        assert sorted(sizes[0])[1:] == [12 // processes] * 4
        orders.append([i for epoch in epochs for batch in epoch for i in batch])
        assert {*orders[-1]} == {*range(50)}
        assert len(orders[-1]) == 50 + -50 % processes
    assert orders[0] != orders[1] != orders[2]


def test_an_epoch_that_is_left_early_goes_on_in_the_next_one():
    source = loader()
    first = next(iter(source))[0].tolist()
    rest = [batch[0].tolist() for batch in source][: len(source) - 1]
    assert sorted([*first, *chain(*rest)]) == [*range(50)]


def test_loader_batches_hold_similar_lengths():
    ranges = [batch[1].max() - batch[1].min() for batch in [b for _ in range(10) for b in loader()]]
    shuffled = torch.tensor(LENGTHS)[torch.randperm(50)][:48].view(6, 8)
    assert torch.stack(ranges).float().mean() < (shuffled.amax(1) - shuffled.amin(1)).float().mean() / 2


@pytest.mark.parametrize(
    ("count", "processes", "batch_size"),
    [(50, 1, 4), (50, 2, 4), (7, 3, 4), (3, 3, 4), (33, 4, 4), (5, 2, 1), (4, 2, 1)],
)
def test_evaluation_takes_each_example_once_in_equally_many_batches(count, processes, batch_size):
    shares = [evaluation_batches(count, batch_size, (process, processes)) for process in range(processes)]
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(count))
    assert len({len(share) for share in shares}) == 1
    sizes = {len(batch) for share in shares for batch in share}
    assert min(sizes) > 0
    assert max(sizes) <= max(batch_size, 1 + (count % processes > 0))
    assert all(max(map(len, share)) - min(map(len, share)) <= 1 for share in shares)


def test_fewer_examples_than_a_batch_are_one_and_than_processes_are_refused():
    (batch,) = ResumableLoader(TensorDataset(torch.arange(2)), [1, 1], 8, 0, default_collate)
    assert sorted(batch[0].tolist()) == [0, 1]
    with pytest.raises(ConfigurationError, match="2 examples .* 3 processes"):
        evaluation_batches(2, 4, (0, 3))


def test_spread_takes_from_everywhere():
    ten = Dataset.from_dict({"number": range(10)})
    assert [*spread(ten, 5)["number"]] == [0, 2, 4, 6, 8]
    assert [*spread(ten, 15)["number"]] == [*spread(ten, None)["number"]] == [*range(10)]
