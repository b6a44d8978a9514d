"""A change of rank in a live model: all or nothing, and nothing else moves."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close

import dynrank
from dynrank.change.resize import resize
from dynrank.driver.driver import RankDriver
from dynrank.driver.training import Training
from dynrank.errors import ConfigurationError
from dynrank.linalg import truncate_product
from dynrank.rank_map import RankBounds
from dynrank.triggers import Run

SHAPES = {"0": (12, 10), "2": (12, 12), "4": (8, 12)}


def train(net, optimizer, steps):
    data = torch.randn(16, 10, generator=torch.Generator().manual_seed(2))
    for _ in range(steps):
        optimizer.zero_grad()
        net(data).square().mean().backward()
        optimizer.step()


@pytest.fixture
def trained():
    """(net of three LoRA layers of rank 6 with alpha 9, AdamW that has made some steps)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 8))
    dynrank.add_lora(net, rank=6, alpha=9, target_modules=list(SHAPES))
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    train(net, optimizer, 5)
    return net, optimizer


def snapshot(net, optimizer):
    return copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())


def assert_unchanged(net, optimizer, before):
    tensors, state = before
    for key, value in net.state_dict().items():
        assert torch.equal(value.nan_to_num(7.0), tensors[key].nan_to_num(7.0)), key
    assert_close(optimizer.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("target", [3, 8])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_resize_names_the_diverged_layer_and_changes_nothing(trained, target, value, factor):
    net, optimizer = trained
    with torch.no_grad():
        getattr(net[4], factor)[0, 0] = value
    before = snapshot(net, optimizer)
    message = rf"'4': {factor} must be finite.*nothing has been changed.*lr"
    with pytest.raises(ConfigurationError, match=message):
        resize(net, target, optimizers=[optimizer])
    assert_unchanged(net, optimizer, before)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"0": 3, "9": 3, "zero": 3}, r"(?s)'9' matches no LoRA layer.*'zero' matches no LoRA layer"),
        ({".*": 3, "[02]": 2}, r"'\[02\]' is hidden by '\.\*'"),
        ({"0": 11, "4": 0}, r"(?s)'0': rank must be between 1 and min\(d_in, d_out\) = 10, got 11.*'4'.*got 0"),
        (9, r"'4': rank must be .* = 8, got 9"),
        (-1, "got -1"),
        ({"0": 2.5}, "rank"),
    ],
)
def test_resize_refuses_what_cannot_be_done_and_changes_nothing(trained, target, message):
    net, optimizer = trained
    before = snapshot(net, optimizer)
    with pytest.raises(ConfigurationError, match=message):
        resize(net, target, optimizers=[optimizer])
    assert_unchanged(net, optimizer, before)


def with_zero_3(net, optimizer):
    net[4].lora_A.ds_id = 7
    return [optimizer]


def with_zero_2(net, optimizer):
    """The optimizer is DeepSpeed's own, so nobody passes it."""
    net[4].lora_A.get_full_hp_param = lambda: None
    return []


def with_flat_copies(net, optimizer):
    """As accelerate passes on the optimizer of ZeRO 1 and 2."""
    flat = torch.cat([parameter.detach().flatten() for parameter in dynrank.adapter_parameters(net)])
    return [torch.optim.AdamW([nn.Parameter(flat)])]


@pytest.mark.parametrize("shard", [with_zero_3, with_zero_2, with_flat_copies])
def test_factors_of_which_deepspeed_trains_copies_are_refused(trained, shard):
    """By the attributes that DeepSpeed sets; at the start of a run, too."""
    net, optimizer = trained
    optimizers = shard(net, optimizer)
    before = snapshot(net, optimizer)
    with pytest.raises(ConfigurationError, match=r"DeepSpeed.*use DDP"):
        resize(net, 3, optimizers=optimizers)
    with pytest.raises(ConfigurationError, match=r"DeepSpeed.*use DDP"):
        RankDriver(3).start(Training(net, optimizers), Run(10))
    assert_unchanged(net, optimizer, before)


def test_resize_refuses_a_model_without_layers():
    with pytest.raises(ConfigurationError, match="no LoRA layers"):
        resize(nn.Sequential(nn.Linear(2, 2)), 1, optimizers=())


def test_resize_changes_only_the_layers_of_a_mapping(trained):
    net, optimizer = trained
    before = copy.deepcopy(net.state_dict())
    reports = resize(net, {"4": 2, "0": 7, "2": 6}, optimizers=[optimizer])
    assert [(r.layer, r.rank_before, r.rank_after) for r in reports] == [("0", 6, 7), ("4", 6, 2)]
    assert [layer.rank for _, layer in dynrank.lora_layers(net)] == [7, 6, 2]
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items() if key.startswith("2."))


@pytest.mark.parametrize("target", [1, 4, 8])
def test_resize_update_is_the_best_of_its_rank_and_the_report_says_so(trained, target):
    net, optimizer = trained
    dense = {name: layer.delta_weight().detach().double() for name, layer in dynrank.lora_layers(net)}
    for report in resize(net, target, optimizers=[optimizer]):
        u, s, vh = torch.linalg.svd(dense[report.layer], full_matrices=False)
        layer = dict(dynrank.lora_layers(net))[report.layer]
        assert (layer.rank, layer.scaling, layer.alpha) == (target, 1.5, 1.5 * target)
        after = layer.delta_weight().detach().double()
        # the factors are float32: 1e-6 of the update's largest singular value
        atol = 1e-6 * float(s[0])
        assert_close(after, u[:, :target] * s[:target] @ vh[:target], rtol=0, atol=atol)
        assert report.predicted_error == pytest.approx(float((dense[report.layer] - after).norm()), abs=atol)
        assert report.singular_values == pytest.approx(s[:6].tolist(), abs=atol)
        kept = s[:target].square().sum() / s.square().sum()
        assert report.energy_kept == pytest.approx(float(kept), abs=1e-6)
        assert report.parameters_saved == (6 - target) * sum(SHAPES[report.layer])


@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("inference", [False, True])
def test_resize_keeps_parameters_and_groups_which_go_on_learning(trained, rank, inference):
    net, optimizer = trained
    ids = [id(parameter) for parameter in net.parameters()]
    (group,) = optimizer.param_groups
    factors = [p for p in net.parameters() if p.requires_grad]
    settings = {key: value for key, value in group.items() if key != "params"}
    with torch.inference_mode(inference):
        resize(net, rank, optimizers=[optimizer])
    assert [id(parameter) for parameter in net.parameters()] == ids
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in factors]
    assert optimizer.param_groups == [{"params": group["params"], **settings}]
    assert all(parameter.grad is None for parameter in net.parameters())
    before = [factor.detach().clone() for factor in factors]
    train(net, optimizer, 3)
    assert not any(map(torch.equal, before, factors))


def test_resize_optimizer_state_of_each_factor_moves_by_the_map_of_the_other(trained):
    net, optimizer = trained
    pair = net[2].lora_A, net[2].lora_B
    change = truncate_product(pair[1], pair[0], 3)
    old = copy.deepcopy([optimizer.state[factor] for factor in pair])
    resize(net, 3, optimizers=iter([optimizer]))
    new = [optimizer.state[factor] for factor in pair]
    for key, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
        from_A = change.from_A.float() ** power
        from_B = change.from_B.float() ** power
        assert_close(new[0][key], from_B.mT @ old[0][key])
        assert_close(new[1][key], old[1][key] @ from_A.mT)
    assert new[0]["step"] == new[1]["step"] == 5


@pytest.mark.parametrize(
    ("keys", "expected"),
    [({"[24]": 3}, [6, 3, 3]), ({"4": 2, ".*": 3}, [3, 3, 2]), ({".*": 3, "4": 2}, [3, 3, 2]), ({"0|4": 8}, [8, 6, 8])],
)
def test_keys_may_be_patterns_and_names_go_before_them(trained, keys, expected):
    net, optimizer = trained
    resize(net, keys, optimizers=[optimizer])
    assert [layer.rank for _, layer in dynrank.lora_layers(net)] == expected
    train(net, optimizer, 1)


def test_optimizers_have_no_default_and_none_is_an_empty_list(trained):
    net, optimizer = trained
    before = snapshot(net, optimizer)
    with pytest.raises(TypeError, match="optimizers"):
        resize(net, 3)
    assert resize(net, 3, optimizers=(), dry_run=True)
    assert_unchanged(net, optimizer, before)
    optimizer.state.clear()
    resize(net, 3, optimizers=())
    train(net, optimizer, 1)


def test_balance_equalises_factors_in_a_cut_and_moves_their_moments(trained):
    net, optimizer = trained
    layers = dict(dynrank.lora_layers(net))
    layers["0"].bounds = RankBounds(pinned=True)
    update = layers["2"].delta_weight().detach().clone()
    pair = [(p, optimizer.state[p]["exp_avg"]) for p in (layers["2"].lora_A, layers["2"].lora_B)]
    old = [(parameter * moment).sum().item() for parameter, moment in pair]
    untouched = copy.deepcopy(net[0].state_dict())
    reports = resize(net, {"0": 6, "2": 6, "4": 2}, optimizers=[optimizer], balance=True)
    assert [(report.layer, report.rank_before, report.rank_after) for report in reports] == [("2", 6, 6), ("4", 6, 2)]
    lora_A = layers["2"].lora_A
    lora_B = layers["2"].lora_B
    assert_close(lora_A @ lora_A.mT, lora_B.mT @ lora_B, rtol=1e-4, atol=1e-6)
    assert_close(layers["2"].delta_weight(), update, rtol=1e-5, atol=1e-6)
    # A gradient times the parameter does not depend on the coordinates, because all directions stay.
    new = [(p * optimizer.state[p]["exp_avg"]).sum().item() for p in (lora_A, lora_B)]
    assert new == pytest.approx(old, rel=1e-3)
    assert all(torch.equal(value, untouched[key]) for key, value in net[0].state_dict().items())


def test_balance_beside_a_growth_changes_no_other_layer(trained):
    net, optimizer = trained
    before = copy.deepcopy(net[2].state_dict())
    resize(net, {"0": 8, "2": 6}, optimizers=[optimizer], balance=True)
    assert all(torch.equal(value, before[key]) for key, value in net[2].state_dict().items())


def test_layers_are_balanced_at_their_own_ranks(trained):
    net, optimizer = trained
    layers = dict(dynrank.lora_layers(net))
    updates = {name: layer.delta_weight().detach().clone() for name, layer in layers.items()}
    ranks = {name: layer.rank for name, layer in layers.items()}
    reports = resize(net, ranks, optimizers=[optimizer], balance=True)
    assert {report.layer: report.rank_after for report in reports} == ranks
    assert all(report.energy_kept == 1 for report in reports)
    for name, layer in layers.items():
        assert_close(layer.lora_A @ layer.lora_A.mT, layer.lora_B.mT @ layer.lora_B, rtol=1e-4, atol=1e-6)
        assert_close(layer.delta_weight(), updates[name], rtol=1e-5, atol=1e-6)


def test_peft_layer_of_a_rank_above_its_shape_may_keep_it_beside_a_cut():
    net = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 64)), LoraConfig(r=12, target_modules=["0", "1"]))
    layers = dict(dynrank.lora_layers(net))
    for layer in layers.values():
        nn.init.normal_(layer.lora_B)
    wide, other = layers
    update = (layers[wide].lora_B @ layers[wide].lora_A).detach()
    assert not resize(net, 12, optimizers=())
    reports = resize(net, {wide: 12, other: 6}, balance=True, optimizers=())
    assert {report.layer: report.rank_after for report in reports} == {wide: 12, other: 6}
    assert_close(layers[wide].lora_B @ layers[wide].lora_A, update, rtol=1e-4, atol=1e-5)
