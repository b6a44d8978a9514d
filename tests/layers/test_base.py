"""What all LoRA layers share, shown on one: checkpoints of another rank, and merging."""

import copy

import pytest
import torch
from torch import nn
from trained import updated

from dynrank.errors import ConfigurationError
from dynrank.layers.kinds import LoRALinear


def layer(rank=3, dtype=torch.float32):
    torch.manual_seed(0)
    return updated(LoRALinear(nn.Linear(7, 6, dtype=dtype), rank=rank, scaling=1.5))


@pytest.mark.parametrize("rank", [1, 6])
def test_load_state_dict_takes_the_rank_of_the_checkpoint(rank):
    source = layer(rank)
    target = layer(3)
    x = torch.randn(4, 7)
    original = copy.deepcopy(target)
    target.scaling = 4.0
    ids = [id(target.lora_A), id(target.lora_B)]
    nn.init.zeros_(target.lora_A)
    target(x).sum().backward()
    assert target.weight.grad is target.bias.grad is None
    target.load_state_dict(source.state_dict())
    assert [id(target.lora_A), id(target.lora_B)] == ids
    assert (target.rank, target.alpha) == (rank, 1.5 * rank)
    assert torch.equal(target(x), source(x))
    # The new gradient has another shape than the one that stood there.
    target(x).sum().backward()
    assert torch.equal(original(x), layer(3)(x))


@pytest.mark.parametrize(
    ("lora_A", "lora_B"),
    [((3, 8), (6, 3)), ((3, 7), (5, 3)), ((3, 7), (6, 2)), ((7, 7), (6, 7)), ((0, 7), (6, 0)), ((3, 7, 1), (6, 3))],
)
def test_load_state_dict_names_the_layer_when_the_factors_do_not_fit(lora_A, lora_B):
    net = nn.ModuleDict({"deep": nn.Sequential(layer())})
    before = copy.deepcopy(net.state_dict())
    state = {**before, "deep.0.lora_A": torch.ones(lora_A), "deep.0.lora_B": torch.ones(lora_B)}
    with pytest.raises(ConfigurationError, match=r"factors of 'deep\.0' are"):
        net.load_state_dict(state)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
