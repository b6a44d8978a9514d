import pytest
import torch
from torch.utils.data import TensorDataset, default_collate

from dynrank.tasks.loader import CHUNK, ResumableLoader

LENGTHS = [1 + i % 7 for i in range(50)]


def loader(seed=0):
    data = TensorDataset(torch.arange(50), torch.tensor(LENGTHS))
    return ResumableLoader(data, LENGTHS, 8, seed, default_collate)


def stream(source, count):
    batches = []
    while len(batches) < count:
        batches += [tuple(batch[0].tolist()) for batch in source]
    return batches[:count]


@pytest.mark.parametrize("given", range(0, 30, 3))
def test_loader_resumes_at_any_batch(given):
    whole = stream(loader(), 40)
    first = loader()
    for count, _ in enumerate(iter(first), start=1):
        if count == min(given, len(first)):
            break
    state = {"given": given} if given > len(first) else first.state_dict()
    second = loader()
    second.load_state_dict(state)
    assert stream(second, 10) == whole[state["given"] : state["given"] + 10]


def test_loader_order_depends_on_the_seed_alone():
    assert stream(loader(1), 12) == stream(loader(1), 12) != stream(loader(2), 12)


def test_loader_gives_an_epoch_of_full_batches():
    batches = list(loader())
    assert len(batches) == len(loader()) == 50 // 8
    assert {len(batch[0]) for batch in batches} == {8}


def test_loader_batches_hold_similar_lengths():
    spread = [batch[1].max() - batch[1].min() for batch in [b for _ in range(10) for b in loader()]]
    shuffled = torch.tensor(LENGTHS)[torch.randperm(50)][:48].view(6, 8)
    assert torch.stack(spread).float().mean() < (shuffled.amax(1) - shuffled.amin(1)).float().mean() / 2


def test_loader_uses_every_example_in_time():
    assert {i for batch in stream(loader(), CHUNK * 10) for i in batch} == set(range(50))


def test_loader_refuses_fewer_examples_than_a_batch():
    with pytest.raises(ValueError, match="at most the number of examples, 2, got 8"):
        ResumableLoader(TensorDataset(torch.arange(2)), [1, 1], 8, 0, default_collate)
