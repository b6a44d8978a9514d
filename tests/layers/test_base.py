"""What all LoRA layers share, shown on one: checkpoints of another rank, merging, and refused values."""

import copy
import io

import pytest
import torch
from torch import nn

import dynrank
from dynrank.errors import ConfigurationError
from dynrank.layers.kinds import LoRALinear


def layer(rank=3, d_in=7, d_out=6, dtype=torch.float32, **options):
    torch.manual_seed(0)
    made = LoRALinear(nn.Linear(d_in, d_out, dtype=dtype), rank=rank, scaling=1.5, **options)
    nn.init.normal_(made.lora_B)
    return made


@pytest.mark.parametrize("rank", [1, 2, 3, 6])
def test_load_state_dict_takes_the_rank_of_the_checkpoint(rank):
    source, target = layer(rank), layer(3)
    target.scaling = 4.0
    ids = [id(target.lora_A), id(target.lora_B)]
    nn.init.zeros_(target.lora_A)
    target(torch.randn(2, 7)).sum().backward()
    target.load_state_dict(source.state_dict())
    assert [id(target.lora_A), id(target.lora_B)] == ids
    assert target.rank == rank
    assert target.scaling == 1.5  # the source's
    assert target.alpha == 1.5 * rank
    x = torch.randn(4, 7)
    assert torch.equal(target(x), source(x))
    assert all(p.grad is None or p.grad.shape == p.shape for p in target.parameters())


def test_load_state_dict_reads_a_checkpoint_file_into_a_model():
    def net(rank):
        torch.manual_seed(1)
        made = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 6))
        return dynrank.add_lora(made, rank=rank, target_modules=["0", "1"])

    source = net(5)
    dynrank.resize(source, {"0": 2, "1": 4})
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target = net(3)
    target.load_state_dict(torch.load(file, weights_only=True))
    assert [made.rank for _, made in dynrank.lora_layers(target)] == [2, 4]
    x = torch.randn(4, 7)
    # equal up to scaling: both started at alpha / rank = 1
    assert torch.equal(target(x), source(x))


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


def test_load_state_dict_into_a_copy_leaves_the_original_alone():
    original = layer(3)
    twin, before = copy.deepcopy(original), copy.deepcopy(original.state_dict())
    twin.load_state_dict(layer(5).state_dict())
    assert (twin.rank, original.rank) == (5, 3)
    assert all(torch.equal(value, before[key]) for key, value in original.state_dict().items())


def test_what_would_count_the_update_twice_is_refused():
    net = nn.ModuleDict({"deep": layer()})
    state, made = net.state_dict(), net["deep"]
    with pytest.raises(RuntimeError, match="not merged"):
        made.unmerge()
    made.merge()
    weight = made.weight.clone()
    with pytest.raises(RuntimeError, match="already merged"):
        made.merge()
    with pytest.raises(RuntimeError, match=r"'deep' is merged.*unmerge"):
        net.state_dict()
    with pytest.raises(RuntimeError, match=r"'deep' is merged.*unmerge"):
        net.load_state_dict(state)
    assert torch.equal(made.weight, weight)
    made.unmerge()
    assert list(net.state_dict()) == list(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_merge_of_a_zero_update_leaves_the_weight_bit_equal(dtype):
    made = layer(dtype=dtype)
    nn.init.zeros_(made.lora_B)
    before = made.weight.clone()
    made.merge()
    assert torch.equal(made.weight, before)


def test_merge_leaves_a_weight_shared_with_another_module_alone():
    made, other = layer(), nn.Linear(7, 6)
    other.weight = made.base.weight
    before = other.weight.clone()
    made.merge()
    assert torch.equal(other.weight, before)
    assert not torch.equal(made.weight, before)
    made.unmerge()
    assert made.weight is other.weight


def test_set_factors_keeps_the_parameters_and_drops_their_gradients():
    made = layer()
    made(torch.ones(1, 7)).sum().backward()
    pair = made.lora_A, made.lora_B
    made.set_factors(torch.ones(2, 7), torch.ones(6, 2))
    assert [id(made.lora_A), id(made.lora_B)] == [id(parameter) for parameter in pair]
    assert made.lora_A.grad is made.lora_B.grad is None
    made(torch.ones(1, 7)).sum().backward()
    assert made.lora_A.grad.shape == (2, 7)


def test_layer_freezes_its_base_and_trains_its_factors():
    made = layer()
    assert [name for name, p in made.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    made(torch.ones(1, 7)).sum().backward()
    assert made.weight.grad is made.bias.grad is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be between 1"),
        ({"rank": 7}, r"min\(d_in, d_out\) = 6, got 7"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"dropout": -0.1}, "dropout must be"),
    ],
)
def test_layer_refuses_a_value_out_of_range_and_leaves_its_base_trainable(options, message):
    base = nn.Linear(7, 6)
    with pytest.raises(ConfigurationError, match=message):
        LoRALinear(base, **({"rank": 2, "scaling": 1.0} | options))
    assert base.weight.requires_grad
